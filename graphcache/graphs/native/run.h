// Sessions: what launches a graph on its static buffers.
#pragma once

#include "conditions.h"
#include "executables.h"

#include <array>

namespace {

// A graph of a session's own on its static buffers: Session.run.
struct Run {
  PyObject_HEAD
  vectorcallfunc call;
  State* state;  // Of the table.
  void* executable;
  uint64_t context;
  int device;
  PyObject *table, *graph, *order, *lock, *index, *otherwise;
};

std::array<PyObject**, 6> held_by(Run& run) {
  return {&run.table, &run.graph, &run.order, &run.lock, &run.index, &run.otherwise};
}

Outcome run_once(Run& run) {
  State& state = *run.state;
  uint64_t stream = 0;
  if (const auto known = current_stream(state, run.index, run.device, &stream); known != Outcome::done) return known;
  if (!is_here(state, stream, run.context)) return Outcome::left_alone;
  Held lock(*reinterpret_cast<Lock*>(run.lock));
  if (!lock) return Outcome::left_alone;
  if (!state.is_open(run.graph) || state.stream.number(run.order) != stream) return Outcome::left_alone;
  return launch(*state.driver, run.executable, stream);
}

PyObject* run_call(PyObject* self, PyObject* const*, size_t given, PyObject* names) {
  HANDLE_TH_ERRORS
  if (PyVectorcall_NARGS(given) != 0 || (names != nullptr && PyTuple_GET_SIZE(names) != 0))
    return PyErr_Format(PyExc_TypeError, "run() takes no arguments");
  Run& run = *reinterpret_cast<Run*>(self);
  const auto outcome = run.graph == nullptr ? Outcome::left_alone : run_once(run);
  if (outcome == Outcome::failed) return nullptr;
  if (outcome == Outcome::done) Py_RETURN_NONE;
  if (run.otherwise == nullptr) return PyErr_Format(PyExc_RuntimeError, "this session is gone");
  Ref otherwise(Py_NewRef(run.otherwise));
  return PyObject_CallNoArgs(otherwise.get());
  END_HANDLE_TH_ERRORS
}

int run_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  for (PyObject** each : held_by(*reinterpret_cast<Run*>(self))) Py_VISIT(*each);
  return 0;
}

int run_clear(PyObject* self) {
  for (PyObject** each : held_by(*reinterpret_cast<Run*>(self))) Py_CLEAR(*each);
  return 0;
}

void run_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  run_clear(self);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef run_members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Run, call), READONLY, nullptr},
                             {nullptr, 0, 0, 0, nullptr}};

PyType_Slot run_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(run_dealloc)},
                           {Py_tp_traverse, reinterpret_cast<void*>(run_traverse)},
                           {Py_tp_clear, reinterpret_cast<void*>(run_clear)},
                           {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                           {Py_tp_members, run_members},
                           {0, nullptr}};

PyType_Spec run_spec = {"_graphcache_hit.Run", sizeof(Run), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                            Py_TPFLAGS_DISALLOW_INSTANTIATION,
                        run_slots};

PyTypeObject* run_type;

// (graph, order, lock, index, context, executable, otherwise)
PyObject* table_run(Table* self, PyObject* given) {
  HANDLE_TH_ERRORS
  State& state = *self->state;
  PyObject *graph, *order, *lock, *index, *executable, *otherwise;
  unsigned long long context;
  if (!PyArg_ParseTuple(given, "OOOOKOO:run", &graph, &order, &lock, &index, &context, &executable, &otherwise))
    return nullptr;
  void* handle = pointer_of(executable);
  if (PyErr_Occurred()) return nullptr;
  if (!state.executable.is_of(graph) || !state.stream.is_of(order))
    return PyErr_Format(PyExc_TypeError, "expected a CudaGraph and a StreamOrder");
  if (!Py_IS_TYPE(lock, lock_type)) return Py_NewRef(otherwise);
  auto* made = reinterpret_cast<Run*>(run_type->tp_alloc(run_type, 0));
  if (made == nullptr) return nullptr;
  made->call = run_call;
  made->state = &state;
  made->executable = handle;
  made->context = context;
  made->device = device_of(index);
  made->table = Py_NewRef(reinterpret_cast<PyObject*>(self));
  made->graph = Py_NewRef(graph);
  made->order = Py_NewRef(order);
  made->lock = Py_NewRef(lock);
  made->index = Py_NewRef(index);
  made->otherwise = Py_NewRef(otherwise);
  return reinterpret_cast<PyObject*>(made);
  END_HANDLE_TH_ERRORS
}

}  // namespace
