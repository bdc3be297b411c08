// A hit in native code: what Dispatcher.__call__ (dispatch/dispatcher.py) and CudaGraph.replay (graphs/cuda.py) do.
//
// What both ways need stands in Python objects: whether a graph is open, on which stream an order ran last, how often an
// entry was hit. It is read and written here at the offsets that the member descriptors of __slots__ name. A graph's
// first executable is Python's, and where it points stands in an array that both keep right. Its further executables and
// the outputs of its next call are of this side alone (graph.h). So the general way, in Python, may run between any two
// calls.
//
// A Table holds records by the layout of the inputs (table.h). A call is either answered, or raises what the Python way
// raises, or is left alone with nothing changed, and then goes the Python way (answer.h). What decides is asked before
// the launch. The exception is the callable that looks at a module's parameters (is_stale), which is called while the
// device works; then the launch was in vain, as on the Python way.
//
// Calls come here by the vectorcall of two Python functions (doors.h), and sessions by an object of their own (run.h).
//
// The GIL is held throughout, but for cuGraphLaunch, which blocks while the launch queue is full. The order's lock is
// held from the first look at the graph to the last change of it; it is the GIL that guards it (lock.h).
//
// CUDA's headers and libraries are not needed: the addresses of seven driver functions come from Python (driver.h).

#include "doors.h"
#include "table.h"

namespace {

// What the probe asks: the same questions, answered by themselves.

PyObject* module_is_quiet(PyObject*, PyObject*) { return PyBool_FromLong(nothing_special()); }

PyObject* module_layout(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  c10::TensorImpl* tensors[most_inputs];
  Words words;
  if (!PyTuple_CheckExact(args) || !describe(args, tensors, words)) Py_RETURN_NONE;
  Ref made(PyTuple_New(static_cast<Py_ssize_t>(words.size())));
  if (!made) return nullptr;
  for (size_t i = 0; i < words.size(); ++i) {
    PyObject* word = PyLong_FromUnsignedLongLong(words[i]);
    if (word == nullptr) return nullptr;
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), word);
  }
  return made.release();
  END_HANDLE_TH_ERRORS
}

PyObject* module_address(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  c10::TensorImpl* tensor = plain(object);
  if (tensor == nullptr) Py_RETURN_NONE;
  return PyLong_FromUnsignedLongLong(address_of(tensor));
  END_HANDLE_TH_ERRORS
}

PyObject* module_empty_like(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  Maker maker;
  if (!make_as(object, maker)) Py_RETURN_NONE;
  return make(maker);
  END_HANDLE_TH_ERRORS
}

PyMethodDef module_methods[] = {
    {"open", module_open, METH_VARARGS, "Let calls of two Python functions come to the table of their module first."},
    {"is_quiet", module_is_quiet, METH_NOARGS, "No gradients, autocast, modes, transforms or tracing here."},
    {"layout", module_layout, METH_O, "What tells a tuple of plain tensors from others; None for anything else."},
    {"address", module_address, METH_O, "Where a plain tensor's data lies; None for anything else."},
    {"empty_like", module_empty_like, METH_O, "A new tensor like a plain one, from its allocator; None if it has none."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_graphcache_hit", nullptr, -1, module_methods};

}  // namespace

PyMODINIT_FUNC PyInit__graphcache_hit() {
  Ref module(PyModule_Create(&module_def));
  Ref type(PyType_FromSpec(&table_spec));
  Ref run(PyType_FromSpec(&run_spec)), lock(PyType_FromSpec(&lock_spec)), graph(PyType_FromSpec(&graph_spec));
  if (!module || !type || !run || !lock || !graph || PyModule_AddObjectRef(module.get(), "Table", type.get()) < 0 ||
      PyModule_AddObjectRef(module.get(), "Lock", lock.get()) < 0)
    return nullptr;
  lock_type = reinterpret_cast<PyTypeObject*>(lock.release());
  table_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type.get()));
  run_type = reinterpret_cast<PyTypeObject*>(run.release());
  graph_type = reinterpret_cast<PyTypeObject*>(graph.release());
  return module.release();
}
