// The answer to a call: find its graph, choose and point an executable, launch, and prepare the next call.
#pragma once

#include "conditions.h"
#include "executables.h"

namespace {

// New outputs, and where they lie: done, with none where the allocator aligns to less than is needed, or failed.
Outcome make_outputs(Graph& graph, Ref& made, uint64_t* addresses) {
  const size_t count = graph.outputs();
  Ref fresh(PyList_New(static_cast<Py_ssize_t>(count)));
  if (!fresh) return Outcome::failed;
  for (size_t i = 0; i < count; ++i) {
    PyObject* each = make(graph.makers[i]);
    if (each == nullptr) return Outcome::failed;
    PyList_SET_ITEM(fresh.get(), static_cast<Py_ssize_t>(i), each);
    c10::TensorImpl* tensor = plain(each);
    addresses[i] = tensor == nullptr ? 0 : address_of(tensor);
    if (addresses[i] == 0 || (addresses[i] & graph.places[graph.inputs + i].mask) != 0) return Outcome::done;
  }
  made = std::move(fresh);
  return Outcome::done;
}

// The outputs of this call: those that lie ready, or new ones; none where the allocator aligns to less than is needed.
Outcome take_outputs(Graph& graph, uint64_t stream, Ref& outputs, uint64_t* addresses) {
  outputs = std::move(graph.ready);
  if (!outputs || graph.ready_stream != stream || graph.ready_inference != c10::InferenceMode::is_enabled()) {
    outputs = nullptr;
    return make_outputs(graph, outputs, addresses);
  }
  for (size_t i = 0; i < graph.outputs(); ++i)
    addresses[i] = address_of(plain(PyList_GET_ITEM(outputs.get(), static_cast<Py_ssize_t>(i))));
  return Outcome::done;
}

// The outputs of the next call. This call has its answer: no memory and no driver that agrees are the next one's to say.
Outcome prepare_next(State& state, Graph& graph, Lock& lock, uint64_t stream) {
  uint64_t addresses[most_places];
  Ref fresh;
  if (make_outputs(graph, fresh, addresses) != Outcome::done ||
      (fresh && launched(graph, lock, addresses) != Outcome::done)) {
    if (!PyErr_ExceptionMatches(state.quiet.get())) return Outcome::failed;
    PyErr_Clear();
    return Outcome::done;
  }
  graph.ready = std::move(fresh);
  graph.ready_stream = stream;
  graph.ready_inference = c10::InferenceMode::is_enabled();
  return Outcome::done;
}

// Whether the module is what it was when the graph was proven; an engine's epoch is compared with the lock held.
Outcome holds(const Record& record) {
  if (record.is_stale == nullptr) return Outcome::done;
  Ref stale(PyObject_CallOneArg(record.is_stale, Py_False));
  const int is = stale ? PyObject_IsTrue(stale.get()) : -1;
  return is < 0 ? Outcome::failed : is != 0 ? Outcome::left_alone : Outcome::done;
}

// This was a hit.
Outcome count_hit(State& state, const Record& record) {
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
      __builtin_prefetch(found.native);
      __builtin_prefetch(&found.native->last);
      __builtin_prefetch(&found.native->ready);
      __builtin_prefetch(&state.executable.in(found.graph));
      __builtin_prefetch(&state.hits.in(found.entry));
      return Using(&found);
    }
  return Using();
}

bool overlaps(const Graph& graph, const uint64_t* addresses, size_t output) {
  const uint64_t written = addresses[output], end = written + graph.places[output].nbytes;
  for (size_t i = 0; i < graph.inputs; ++i)
    if (addresses[i] < end && written < addresses[i] + graph.places[i].nbytes) return true;
  return false;
}

// A replay into fresh tensors, made while the device worked on the replay before.
Outcome answer_afresh(State& state, const Record& record, uint64_t stream, uint64_t* addresses, Ref& outputs) {
  Held lock(*record.lock);
  if (!lock) return Outcome::left_alone;
  if (const auto current = is_current(state, record, stream); current != Outcome::done) return current;
  Graph& graph = *record.native;
  if (const auto taken = take_outputs(graph, stream, outputs, addresses + graph.inputs); taken != Outcome::done)
    return taken;
  if (!outputs) return Outcome::left_alone;
  if (const auto aimed = aim(graph, *record.lock, addresses); aimed != Outcome::done) return aimed;
  if (const auto begun = launch(*graph.driver, graph.executables[graph.expected].handle, stream);
      begun != Outcome::done)
    return begun;
  // What remains is done while the device works.
  return prepare_next(state, graph, *record.lock, stream);
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
  if (!are_usable(*record->native, tensors, addresses)) return Outcome::left_alone;
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
  // Asked while the device works: what a stale graph wrote is dropped.
  if (const auto held = holds(*record); held != Outcome::done) return held;
  return count_hit(state, *record);
}

// Whether a graph may write its only output into a tensor: it lies as the graph's own does, and apart from what is read.
bool fits(const Graph& graph, c10::TensorImpl* out, uint64_t* addresses) {
  Words words;
  describe_one(*out, words);
  if (words != graph.target || out->requires_grad()) return false;
  const uint64_t written = addresses[graph.inputs] = address_of(out);
  if (written == 0 || (written & graph.places[graph.inputs].mask) != 0) return false;
  return !overlaps(graph, addresses, graph.inputs);
}

Outcome answer_into(State& state, PyObject* out, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_special()) return Outcome::left_alone;
  c10::TensorImpl *tensors[most_inputs], *target = plain(out);
  Words words;
  if (target == nullptr || !describe(args, count, tensors, words)) return Outcome::left_alone;
  const Using record = find(state, words);
  if (!record || record->build != nullptr || record->native->outputs() != 1) return Outcome::left_alone;
  Graph& graph = *record->native;
  uint64_t stream = 0, addresses[most_places];
  if (const auto may = may_launch(state, *record, &stream); may != Outcome::done) return may;
  if (!are_usable(graph, tensors, addresses) || !fits(graph, target, addresses)) return Outcome::left_alone;
  // Asked before the launch, which writes into the caller's memory and cannot be taken back.
  if (const auto held = holds(*record); held != Outcome::done) return held;
  {
    Held lock(*record->lock);
    if (!lock) return Outcome::left_alone;
    if (const auto current = is_current(state, *record, stream); current != Outcome::done) return current;
    if (const auto aimed = aim(graph, *record->lock, addresses); aimed != Outcome::done) return aimed;
    if (const auto begun = launch(*graph.driver, graph.executables[graph.expected].handle, stream);
        begun != Outcome::done)
      return begun;
    if (const auto noted = launched(graph, *record->lock, nullptr); noted != Outcome::done) return noted;
  }
  return count_hit(state, *record);
}

}  // namespace
