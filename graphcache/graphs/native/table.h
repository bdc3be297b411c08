// The table of a module's graphs, as Python sees it.
#pragma once

#include "answer.h"
#include "run.h"

#include <memory>

namespace {

PyObject* table_call(Table* self, PyObject* args) {
  HANDLE_TH_ERRORS
  Ref result;
  if (!PyTuple_CheckExact(args)) Py_RETURN_NONE;
  const auto outcome = answer(*self->state, PySequence_Fast_ITEMS(args), PyTuple_GET_SIZE(args), args, result);
  if (outcome == Outcome::failed) return nullptr;
  return outcome == Outcome::done ? result.release() : Py_NewRef(Py_None);
  END_HANDLE_TH_ERRORS
}

PyObject* table_into(Table* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) return PyErr_Format(PyExc_TypeError, "into() takes 2 arguments, %zd were given", count);
  if (!PyTuple_CheckExact(given[1])) Py_RETURN_FALSE;
  const auto outcome =
      answer_into(*self->state, given[0], PySequence_Fast_ITEMS(given[1]), PyTuple_GET_SIZE(given[1]));
  if (outcome == Outcome::failed) return nullptr;
  return PyBool_FromLong(outcome == Outcome::done);
  END_HANDLE_TH_ERRORS
}

void* pointer_of(PyObject* number) { return PyLong_AsVoidPtr(number); }

bool is_tuple(PyObject* object) {
  if (PyTuple_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "expected a tuple, got %R", Py_TYPE(object));
  return false;
}

// (mask, nbytes, ((kernel, node, params, context, word, offset), ...))
bool read_place(PyObject* given, Place& place) {
  PyObject* pointers;
  if (!is_tuple(given) ||
      !PyArg_ParseTuple(given, "KKO!:place", &place.mask, &place.nbytes, &PyTuple_Type, &pointers))
    return false;
  if (PyTuple_GET_SIZE(pointers) == 0) {
    PyErr_SetString(PyExc_TypeError, "expected pointers");
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pointers); ++i) {
    int kernel;
    PyObject *node, *params, *context, *word;
    long long offset;
    if (!is_tuple(PyTuple_GET_ITEM(pointers, i)) ||
        !PyArg_ParseTuple(PyTuple_GET_ITEM(pointers, i), "pOOOOL:pointer", &kernel, &node, &params, &context, &word,
                          &offset))
      return false;
    place.pointers.push_back({kernel != 0, pointer_of(node), pointer_of(params), pointer_of(context),
                              static_cast<uint64_t*>(pointer_of(word)), static_cast<uint64_t>(offset)});
    if (PyErr_Occurred()) return false;
  }
  return true;
}

// The table of the executables: an array of 64-bit numbers, as long as its head and rows say.
bool read_table(PyObject* given, Record& record) {
  Py_buffer view;
  if (PyObject_GetBuffer(given, &view, PyBUF_CONTIG) < 0) return false;
  const auto length = static_cast<size_t>(view.len) / sizeof(uint64_t);
  record.table = static_cast<uint64_t*>(view.buf);
  const bool fits = view.itemsize == sizeof(uint64_t) && length >= head &&
      record.table[count_of] >= 1 && record.table[count_of] <= record.table[most_of_them] &&
      record.table[most_of_them] <= (length - head) / (addresses_of + record.places.size());
  PyBuffer_Release(&view);
  if (!fits) PyErr_SetString(PyExc_TypeError, "that is no table of executables");
  return fits;
}

PyObject* table_put(Table* self, PyObject* given) {
  HANDLE_TH_ERRORS
  State& state = *self->state;
  PyObject *args, *entry, *graph, *lane, *lock, *executables, *table, *index, *engine, *epoch, *is_stale, *build, *slots;
  PyObject *places, *buffers, *makers;
  unsigned long long context;
  if (!PyArg_ParseTuple(given, "O!OOOOOOOKOOOOOO!O!O!:put", &PyTuple_Type, &args, &entry, &graph, &lane, &lock,
                        &executables, &table, &index, &context, &engine, &epoch, &is_stale, &build, &slots, &PyTuple_Type,
                        &places, &PyTuple_Type, &buffers, &PyTuple_Type, &makers))
    return nullptr;
  if (!state.hits.is_of(entry) || !state.executables.is_of(graph) || !state.stream.is_of(lane))
    return PyErr_Format(PyExc_TypeError, "expected an Entry, a CudaGraph and a StreamOrder");
  // What was made before there was a library has a lock of Python's.
  if (!Py_IS_TYPE(lock, lock_type)) Py_RETURN_FALSE;
  Using record(new Record);
  c10::TensorImpl* tensors[most_inputs];
  const Py_ssize_t count = PyTuple_GET_SIZE(buffers);
  if (!describe(args, tensors, record->words) || count < 1 || count > most_outputs ||
      PyTuple_GET_SIZE(places) != PyTuple_GET_SIZE(args) + count || PyTuple_GET_SIZE(makers) != count)
    Py_RETURN_FALSE;
  record->entry = record->hold(entry);
  record->graph = record->hold(graph);
  record->lane = record->hold(lane);
  record->lock = reinterpret_cast<Lock*>(record->hold(lock));
  record->executables = record->hold(executables);
  record->executables_table = record->hold(table);
  record->hold(slots);
  record->index = record->hold(index);
  record->device = device_of(index);
  record->context = context;
  if (engine != Py_None && epoch == Py_None) return PyErr_Format(PyExc_TypeError, "an engine without an epoch");
  record->engine = record->hold_unless_none(engine);
  record->epoch = record->hold_unless_none(epoch);
  record->is_stale = record->hold_unless_none(is_stale);
  record->build = record->hold_unless_none(build);
  record->inputs = static_cast<size_t>(PyTuple_GET_SIZE(args));
  record->places.resize(static_cast<size_t>(PyTuple_GET_SIZE(places)));
  for (size_t i = 0; i < record->places.size(); ++i)
    if (!read_place(PyTuple_GET_ITEM(places, static_cast<Py_ssize_t>(i)), record->places[i])) return nullptr;
  if (!read_table(table, *record)) return nullptr;
  record->makers.resize(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    Maker& maker = record->makers[static_cast<size_t>(i)];
    maker.callable = record->hold_unless_none(PyTuple_GET_ITEM(makers, i));
    if (maker.callable == nullptr && !make_as(PyTuple_GET_ITEM(buffers, i), maker)) Py_RETURN_FALSE;
  }
  c10::TensorImpl* target = plain(PyTuple_GET_ITEM(buffers, 0));
  if (target == nullptr) Py_RETURN_FALSE;
  describe_one(*target, record->target);
  const auto [first, last] = state.records.equal_range(hash_of(record->words));
  for (auto each = first; each != last; ++each)
    if (each->second->words == record->words) {
      each->second = std::move(record);  // What was there goes at the end: that may run any code.
      Py_RETURN_TRUE;
    }
  const uint64_t hash = hash_of(record->words);
  state.records.emplace(hash, std::move(record));
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

int table_clear(Table* self) {
  if (self->state != nullptr) {
    decltype(State::records) gone;
    gone.swap(self->state->records);
  }
  return 0;
}

PyObject* table_clear_method(Table* self, PyObject*) {
  table_clear(self);
  Py_RETURN_NONE;
}

PyObject* table_new(PyTypeObject* type, PyObject* given, PyObject* names) {
  HANDLE_TH_ERRORS
  if (names != nullptr && PyDict_GET_SIZE(names) != 0) return PyErr_Format(PyExc_TypeError, "Table() takes no names");
  PyObject *graph, *lane, *entry, *modes_class, *modes, *counter, *raw_stream, *device, *fail, *quiet;
  int torchs_own;
  unsigned long long launch, set_kernel, set_copy, is_capturing, current_context;
  if (!PyArg_ParseTuple(given, "(OOOO)OOOpOOO(KKKKK):Table", &graph, &lane, &entry, &modes_class, &modes, &counter,
                        &raw_stream, &torchs_own, &device, &fail, &quiet, &launch, &set_kernel, &set_copy,
                        &is_capturing, &current_context))
    return nullptr;
  auto state = std::make_unique<State>();
  if (!state->executables.find(graph, "executables") || !state->ready.find(graph, "ready") ||
      !state->ready_stream.find(graph, "ready_stream") || !state->ready_inference.find(graph, "ready_inference") ||
      !state->stream.find(lane, "stream") || !state->last.find(lane, "last") ||
      !state->hits.find(entry, "hits") || !state->used.find(entry, "used") || !state->off.find(modes_class, "off"))
    return nullptr;
  if (!PyContextVar_CheckExact(modes) || !PyIter_Check(counter) || launch == 0 || set_kernel == 0 || set_copy == 0 ||
      is_capturing == 0 || current_context == 0)
    return PyErr_Format(PyExc_TypeError, "expected a context variable, an iterator and five addresses");
  state->classes = Py_NewRef(PyTuple_GET_ITEM(given, 0));
  state->modes = Py_NewRef(modes);
  state->counter = Py_NewRef(counter);
  state->raw_stream = Py_NewRef(raw_stream);
  if (torchs_own && c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA))
    state->streams = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
  if (device != Py_None) state->current_device = Py_NewRef(device);
  state->fail = Py_NewRef(fail);
  state->quiet = Py_NewRef(quiet);
  state->epoch_name = PyUnicode_InternFromString("epoch");
  if (!state->epoch_name) return nullptr;
  state->launch = reinterpret_cast<Launch>(launch);
  state->set_kernel = reinterpret_cast<SetKernel>(set_kernel);
  state->set_copy = reinterpret_cast<SetCopy>(set_copy);
  state->is_capturing = reinterpret_cast<IsCapturing>(is_capturing);
  state->current_context = reinterpret_cast<CurrentContext>(current_context);
  auto* made = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
  if (made != nullptr) made->state = state.release();
  return reinterpret_cast<PyObject*>(made);
  END_HANDLE_TH_ERRORS
}

int table_traverse(Table* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (self->state == nullptr) return 0;
  State& state = *self->state;
  for (Ref* ref : {&state.classes, &state.modes, &state.counter, &state.raw_stream, &state.current_device,
                         &state.fail, &state.quiet})
    Py_VISIT(ref->get());
  for (const auto& each : state.records)
    // One that a call is using too is that call's as well, which the collector must not see as nobody's.
    if (each.second->users == 1)
      for (Ref& ref : each.second->held) Py_VISIT(ref.get());
  return 0;
}

void table_dealloc(Table* self) {
  PyObject_GC_UnTrack(self);
  table_clear(self);
  delete self->state;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* table_length(Table* self, PyObject*) { return PyLong_FromSize_t(self->state->records.size()); }

PyMethodDef table_methods[] = {
    {"call", reinterpret_cast<PyCFunction>(table_call), METH_O, "The answer to a tuple of arguments, or None."},
    {"into", reinterpret_cast<PyCFunction>(table_into), METH_FASTCALL, "Whether out was written, of out and args."},
    {"put", reinterpret_cast<PyCFunction>(table_put), METH_VARARGS, "Remember a graph; whether there is a way for it."},
    {"clear", reinterpret_cast<PyCFunction>(table_clear_method), METH_NOARGS, "Forget every graph."},
    {"run", reinterpret_cast<PyCFunction>(table_run), METH_VARARGS, "What launches a graph on its static buffers."},
    {"count", reinterpret_cast<PyCFunction>(table_length), METH_NOARGS, "How many graphs are known."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot table_slots[] = {{Py_tp_new, reinterpret_cast<void*>(table_new)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
                             {Py_tp_traverse, reinterpret_cast<void*>(table_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(table_clear)},
                             {Py_tp_methods, table_methods},
                             {0, nullptr}};

PyType_Spec table_spec = {"_graphcache_hit.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                          table_slots};

}  // namespace
