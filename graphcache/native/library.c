// Guards and hits in native code. Plain C without the headers of torch and CUDA, so that it compiles in a second and one
// library serves every version of torch.
//
// A guard (guard.h) compares what a graph depends on. A hit (hit.h) is what Dispatcher.__call__ (dispatch/dispatcher.py)
// and CudaGraph.replay (graphs/cuda.py) do. What both ways need stands in Python objects: whether a graph is open, on
// which stream an order ran last, how often an entry was hit. It is read and written here at the offsets that the member
// descriptors of __slots__ name. So the general way, in Python, may run between any two calls.
//
// A Table holds records by the layout of the inputs. A call is either answered, or raises what the Python way raises, or
// is left alone with nothing changed, and then goes the Python way. What decides is asked before the launch, but for the
// guard of a module: it is compared while the device works; then the launch was in vain, as on the Python way. Calls come by the vectorcall of two Python functions (doors.h), and sessions by an object of their own.
//
// The GIL is held throughout, but for cuGraphLaunch, which blocks while the launch queue is full. The order's lock is
// held from the first look at the graph to the last change of it.
#include "doors.h"

// configure(library of torch, seven offsets, tensor types, sets of keys)
static PyObject *configure(PyObject *module UNUSED, PyObject *args) {
  const char *path;
  PyObject *types;
  unsigned long long set[5];
  // What is static here belongs to one interpreter. Python gives every other one a copy of the module.
  if (PyInterpreterState_Get() != PyInterpreterState_Main())
    return PyErr_Format(PyExc_ImportError, "native code is for the main interpreter of a process");
  Py_CLEAR(tensor_types);
  if (!PyArg_ParseTuple(args, "s(nnnnnnn)O!(KKKKK)", &path, &field.impl, &field.storage, &field.offset, &field.keys,
                        &field.dtype, &field.rank, &field.data, &PyTuple_Type, &types, set, set + 1, set + 2, set + 3,
                        set + 4))
    return NULL;
  keys.needed = set[0], keys.permitted = set[1], keys.ignored = set[2], keys.cpu = set[3], keys.cuda = set[4];
  void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == NULL) return PyErr_Format(PyExc_ImportError, "%s", dlerror());
  torch.library = library;
  *(void **)&torch.device_index = dlsym(torch.library, "aoti_torch_get_device_index");
  *(void **)&torch.data = dlsym(torch.library, "aoti_torch_get_data_ptr");
  *(void **)&torch.grad_mode = dlsym(torch.library, "aoti_torch_grad_mode_is_enabled");
  if (torch.device_index == NULL || torch.data == NULL || torch.grad_mode == NULL || thread_keys() == NULL)
    return PyErr_Format(PyExc_ImportError, "this torch lacks a function that native code needs: %s", dlerror());
  tensor_types = Py_NewRef(types);
  Py_RETURN_NONE;
}

// learn_quiet(inference): nothing is special now
static PyObject *learn_quiet(PyObject *module UNUSED, PyObject *inference) {
  const int at = PyObject_IsTrue(inference);
  if (at < 0) return NULL;
  if (tensor_types == NULL) return PyErr_Format(PyExc_RuntimeError, "configure() comes first");
  memcpy(quiet_keys[at], thread_keys(), sizeof quiet_keys[at]);
  Py_RETURN_NONE;
}

static PyObject *is_quiet(PyObject *module UNUSED, PyObject *unused UNUSED) {
  return PyBool_FromLong(nothing_special());
}

static PyObject *layout(PyObject *module UNUSED, PyObject *args) {
  Words words;
  if (!PyTuple_CheckExact(args) || !describe(items_of(args), PyTuple_GET_SIZE(args), &words))
    Py_RETURN_NONE;
  return tuple_of(words.at, words.count);
}

static PyObject *address(PyObject *module UNUSED, PyObject *object) {
  if (tensor_types == NULL || plain_device(object) == NOT_PLAIN) Py_RETURN_NONE;
  return PyLong_FromUnsignedLongLong(address_of(object));
}

// stream_id(address of torch's function, index) -> (device type, device index, id)
static PyObject *stream_id(PyObject *module UNUSED, PyObject *args) {
  unsigned long long function;
  int index;
  if (!PyArg_ParseTuple(args, "Ki", &function, &index)) return NULL;
  const TorchStream found = ((TorchStream(*)(int8_t))(uintptr_t)function)((int8_t)index);
  return Py_BuildValue("iiL", found.device_type, found.device_index, (long long)found.id);
}

static PyObject *use_shortcuts(PyObject *module UNUSED, PyObject *wanted) {
  const int truth = PyObject_IsTrue(wanted), before = shortcuts;
  if (truth < 0) return NULL;
  shortcuts = truth;
  return PyBool_FromLong(before);
}

static PyMethodDef module_functions[] = {
    {"configure", configure, METH_VARARGS, "Say where torch keeps the fields of a tensor."},
    {"learn_quiet", learn_quiet, METH_O, "Remember a context in which nothing is special, in inference mode or not."},
    {"is_quiet", is_quiet, METH_NOARGS, "No gradients, autocast, modes, transforms or tracing here."},
    {"layout", layout, METH_O, "What tells a tuple of plain tensors from others; None for anything else."},
    {"address", address, METH_O, "Where a plain tensor's data lies; None for anything else."},
    {"stream_id", stream_id, METH_VARARGS, "What a function of torch says of the current stream."},
    {"use_shortcuts", use_shortcuts, METH_O, "Whether CPython is trusted to report writes to dictionaries; what was before."},
    {"connect", connect_driver, METH_VARARGS, "Say where the driver's functions are, and what else a launch asks."},
    {"graph", make_graph, METH_VARARGS, "The native half of a graph."},
    {"launcher", make_launcher, METH_VARARGS, "What launches a graph on its static buffers."},
    {"open", open_doors, METH_VARARGS, "Let calls of two Python functions come to the table of their module first."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_graphcache", .m_size = -1, .m_methods = module_functions};

// Makes a type, kept for good, and adds it to the module under a name unless that is NULL.
static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type, const char *name) {
  *type = (PyTypeObject *)PyType_FromSpec(spec);
  return *type == NULL || (name != NULL && PyModule_AddObjectRef(module, name, (PyObject *)*type) < 0) ? -1 : 0;
}

PyMODINIT_FUNC PyInit__graphcache(void) {
  OWNED PyObject *module = PyModule_Create(&module_definition);
  if (module == NULL || add_type(module, &guard_spec, &guard_type, "Guard") ||
      add_type(module, &lock_spec, &lock_type, "Lock") || add_type(module, &graph_spec, &graph_type, NULL) ||
      add_type(module, &table_spec, &table_type, "Table"))
    return NULL;
  start_watcher();
  return Py_NewRef(module);
}
