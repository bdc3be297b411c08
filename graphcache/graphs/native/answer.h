// The answer to a call: find its graph, aim, launch, and prepare the next one.
#pragma once

#include "conditions.h"
#include "executables.h"

namespace {

// New outputs, and where they lie: done, with none where the allocator aligns to less than is needed, or failed.
Outcome make_outputs(const Record& record, Ref& made, uint64_t* addresses) {
  const size_t count = record.outputs();
  Ref fresh(PyList_New(static_cast<Py_ssize_t>(count)));
  if (!fresh) return Outcome::failed;
  for (size_t i = 0; i < count; ++i) {
    PyObject* each = make(record.makers[i]);
    if (each == nullptr) return Outcome::failed;
    PyList_SET_ITEM(fresh.get(), static_cast<Py_ssize_t>(i), each);
    c10::TensorImpl* tensor = plain(each);
    addresses[i] = tensor == nullptr ? 0 : address_of(tensor);
    if (addresses[i] == 0 || (addresses[i] & record.places[record.inputs + i].mask) != 0) return Outcome::done;
  }
  made = std::move(fresh);
  return Outcome::done;
}

// The outputs of the next call. This call has its answer: no memory and no driver that agrees are the next one's to say.
Outcome prepare_next(State& state, const Record& record) {
  uint64_t addresses[most_places];
  Ref fresh;
  if (make_outputs(record, fresh, addresses) != Outcome::done ||
      (fresh && launched(state, record, addresses) != Outcome::done)) {
    if (!PyErr_ExceptionMatches(state.quiet.get())) return Outcome::failed;
    PyErr_Clear();
    return Outcome::done;
  }
  if (fresh) state.ready.put(record.graph, fresh.release());
  return Outcome::done;
}

// After the launch, without the lock: whether the parameters are where they were, and then that this was a hit.
Outcome finish(State& state, const Record& record) {
  if (record.is_stale != nullptr) {
    Ref stale(PyObject_CallOneArg(record.is_stale, Py_False));
    const int is = stale ? PyObject_IsTrue(stale.get()) : -1;
    if (is != 0) return is < 0 ? Outcome::failed : Outcome::left_alone;
  }
  Ref more(PyLong_FromUnsignedLongLong(state.hits.number(record.entry) + 1));
  Ref now(PyIter_Next(state.counter.get()));
  if (!more || !now) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the counter of uses has ended");
    return Outcome::failed;
  }
  state.hits.put(record.entry, more.release());
  state.used.put(record.entry, now.release());
  return Outcome::done;
}

PyObject* as_tuple(PyObject* const* items, Py_ssize_t count) {
  PyObject* made = PyTuple_New(count);
  if (made != nullptr)
    for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(made, i, Py_NewRef(items[i]));
  return made;
}

// A use of its own: whoever clears the table meanwhile takes nothing from under the call.
Using find(State& state, const Words& words) {
  const auto [first, last] = state.records.equal_range(hash_of(words));
  for (auto each = first; each != last; ++each)
    if (each->second->words == words) {
      Record& found = *each->second;
      // With many graphs in turn nothing of one is left in the caches: what is read next comes at once, not one by one.
      __builtin_prefetch(found.table);
      __builtin_prefetch(found.table + 8);
      __builtin_prefetch(found.places.data());
      __builtin_prefetch(&state.executables.in(found.graph));
      __builtin_prefetch(&state.hits.in(found.entry));
      return Using(&found);
    }
  return Using();
}

bool overlaps(const Record& record, const uint64_t* addresses, size_t output) {
  const uint64_t written = addresses[output], end = written + record.places[output].nbytes;
  for (size_t i = 0; i < record.inputs; ++i)
    if (addresses[i] < end && written < addresses[i] + record.places[i].nbytes) return true;
  return false;
}

// A replay into fresh tensors, made while the device worked on the replay before.
Outcome answer_afresh(State& state, const Record& record, uint64_t stream, uint64_t* addresses, Ref& outputs) {
  Held lock(*record.lock);
  if (!lock) return Outcome::left_alone;
  if (const auto current = is_current(state, record, stream); current != Outcome::done) return current;
  PyObject* ready = state.ready.in(record.graph);
  PyObject* inference = c10::InferenceMode::is_enabled() ? Py_True : Py_False;
  if (ready == nullptr || !PyList_CheckExact(ready) ||
      PyList_GET_SIZE(ready) != static_cast<Py_ssize_t>(record.outputs()) ||
      state.ready_stream.number(record.graph) != stream || state.ready_inference.in(record.graph) != inference)
    return Outcome::left_alone;
  for (size_t i = 0; i < record.outputs(); ++i) {
    c10::TensorImpl* tensor = plain(PyList_GET_ITEM(ready, static_cast<Py_ssize_t>(i)));
    if (tensor == nullptr) return Outcome::left_alone;
    addresses[record.inputs + i] = address_of(tensor);
  }
  outputs = Py_NewRef(ready);
  if (const auto aimed = aim(state, record, addresses); aimed != Outcome::done) return aimed;
  if (const auto begun = launch(state, record, stream); begun != Outcome::done) return begun;
  // What remains is done while the device works.
  state.ready.put(record.graph, Py_NewRef(Py_None));
  return prepare_next(state, record);
}

// The answer to some arguments. They are a tuple too, or become one where the answer is built of them.
Outcome answer(State& state, PyObject* const* args, Py_ssize_t count, PyObject* tuple, Ref& result) {
  if (!nothing_special()) return Outcome::left_alone;
  c10::TensorImpl* tensors[most_inputs];
  Words words;
  if (!describe(args, count, tensors, words)) return Outcome::left_alone;
  const Using record = find(state, words);
  if (!record) return Outcome::left_alone;
  uint64_t stream = 0, addresses[most_places];
  if (const auto may = may_launch(state, *record, &stream); may != Outcome::done) return may;
  if (!are_usable(*record, tensors, addresses)) return Outcome::left_alone;
  Ref outputs;
  const auto answered = answer_afresh(state, *record, stream, addresses, outputs);
  if (answered != Outcome::done) return answered;
  if (record->build == nullptr) {
    result = Py_NewRef(PyList_GET_ITEM(outputs.get(), 0));
  } else {
    Ref made(tuple == nullptr ? as_tuple(args, count) : Py_NewRef(tuple));
    if (!made) return Outcome::failed;
    result = PyObject_CallFunctionObjArgs(record->build, outputs.get(), made.get(), nullptr);
    if (!result) return Outcome::failed;
  }
  return finish(state, *record);
}

// Whether a graph may write its only output into a tensor: it lies as the graph's own does, and apart from what is read.
bool fits(const Record& record, c10::TensorImpl* out, uint64_t* addresses) {
  Words words;
  describe_one(*out, words);
  if (words != record.target || out->requires_grad()) return false;
  const uint64_t written = addresses[record.inputs] = address_of(out);
  if (written == 0 || (written & record.places[record.inputs].mask) != 0) return false;
  return !overlaps(record, addresses, record.inputs);
}

Outcome answer_into(State& state, PyObject* out, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_special()) return Outcome::left_alone;
  c10::TensorImpl *tensors[most_inputs], *target = plain(out);
  Words words;
  if (target == nullptr || !describe(args, count, tensors, words)) return Outcome::left_alone;
  const Using record = find(state, words);
  if (!record || record->build != nullptr || record->outputs() != 1) return Outcome::left_alone;
  uint64_t stream = 0, addresses[most_places];
  if (const auto may = may_launch(state, *record, &stream); may != Outcome::done) return may;
  if (!are_usable(*record, tensors, addresses) || !fits(*record, target, addresses)) return Outcome::left_alone;
  {
    Held lock(*record->lock);
    if (!lock) return Outcome::left_alone;
    if (const auto current = is_current(state, *record, stream); current != Outcome::done) return current;
    if (const auto aimed = aim(state, *record, addresses); aimed != Outcome::done) return aimed;
    if (const auto begun = launch(state, *record, stream); begun != Outcome::done) return begun;
    if (const auto noted = launched(state, *record, nullptr); noted != Outcome::done) return noted;
  }
  return finish(state, *record);
}

}  // namespace
