// The table of a module's graphs, as Python sees it.
#pragma once

#include "answer.h"
#include "run.h"

#include <algorithm>
#include <iterator>
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

PyObject* table_graph(Table* self, PyObject* given) {
  HANDLE_TH_ERRORS
  return make_graph(self->state->driver, given);
  END_HANDLE_TH_ERRORS
}

// (args, entry, graph, order, lock, its native half, index, context, engine, epoch, is_stale, build)
PyObject* table_put(Table* self, PyObject* given) {
  HANDLE_TH_ERRORS
  State& state = *self->state;
  PyObject *args, *entry, *graph, *order, *lock, *native, *index, *engine, *epoch, *is_stale, *build;
  unsigned long long context;
  if (!PyArg_ParseTuple(given, "O!OOOOO!OKOOOO:put", &PyTuple_Type, &args, &entry, &graph, &order, &lock, graph_type,
                        &native, &index, &context, &engine, &epoch, &is_stale, &build))
    return nullptr;
  if (!state.hits.is_of(entry) || !state.executable.is_of(graph) || !state.stream.is_of(order))
    return PyErr_Format(PyExc_TypeError, "expected an Entry, a CudaGraph and a StreamOrder");
  // What was made before there was a library has a lock of Python's.
  if (!Py_IS_TYPE(lock, lock_type)) Py_RETURN_FALSE;
  Using record(new Record);
  c10::TensorImpl* tensors[most_inputs];
  record->native = reinterpret_cast<GraphObject*>(record->hold(native))->graph;
  if (!describe(args, tensors, record->words) ||
      static_cast<size_t>(PyTuple_GET_SIZE(args)) != record->native->inputs)
    Py_RETURN_FALSE;
  record->entry = record->hold(entry);
  record->graph = record->hold(graph);
  record->order = record->hold(order);
  record->lock = reinterpret_cast<Lock*>(record->hold(lock));
  record->index = record->hold(index);
  record->device = device_of(index);
  record->context = context;
  if (engine != Py_None && epoch == Py_None) return PyErr_Format(PyExc_TypeError, "an engine without an epoch");
  record->engine = record->hold_unless_none(engine);
  record->epoch = record->hold_unless_none(epoch);
  record->is_stale = record->hold_unless_none(is_stale);
  record->build = record->hold_unless_none(build);
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
  PyObject *graph, *order, *entry, *modes_class, *modes, *counter, *raw_stream, *device, *failure, *quiet;
  int torchs_own;
  unsigned long long addresses[7];
  if (!PyArg_ParseTuple(given, "(OOOO)OOOpOOO(KKKKKKK):Table", &graph, &order, &entry, &modes_class, &modes, &counter,
                        &raw_stream, &torchs_own, &device, &failure, &quiet, &addresses[0], &addresses[1],
                        &addresses[2], &addresses[3], &addresses[4], &addresses[5], &addresses[6]))
    return nullptr;
  auto state = std::make_unique<State>();
  if (!state->executable.find(graph, "executable") || !state->stream.find(order, "stream") ||
      !state->hits.find(entry, "hits") || !state->used.find(entry, "used") || !state->off.find(modes_class, "off"))
    return nullptr;
  if (!PyContextVar_CheckExact(modes) || !PyIter_Check(counter) ||
      std::find(std::begin(addresses), std::end(addresses), 0) != std::end(addresses))
    return PyErr_Format(PyExc_TypeError, "expected a context variable, an iterator and seven addresses");
  state->classes = Py_NewRef(PyTuple_GET_ITEM(given, 0));
  state->modes = Py_NewRef(modes);
  state->counter = Py_NewRef(counter);
  state->raw_stream = Py_NewRef(raw_stream);
  if (torchs_own && c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA))
    state->streams = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
  if (device != Py_None) state->current_device = Py_NewRef(device);
  state->quiet = Py_NewRef(quiet);
  state->epoch_name = PyUnicode_InternFromString("epoch");
  if (!state->epoch_name) return nullptr;
  state->driver = std::make_shared<Driver>(addresses, failure);
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
                   &state.quiet})
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
    {"graph", reinterpret_cast<PyCFunction>(table_graph), METH_VARARGS, "The native half of a graph."},
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
