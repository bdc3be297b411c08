// The native half of a CudaGraph: where its tensors' addresses stand, its executables, and the outputs of its next call.
//
// The first executable is Python's, and so is the array that says where it points; both ways keep that right. The others
// are made, pointed, launched and destroyed here alone. Whoever reads or writes any of this holds the order's lock.
#pragma once

#include "driver.h"
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>

#include <vector>

namespace {

// A place in the graph where an address stands, as param_patching.py found it.
struct Pointer {
  bool kernel;
  void *node, *params, *context;
  uint64_t* word;
  uint64_t offset;
};

// An input or output.
struct Place {
  uint64_t mask;
  uint64_t nbytes;
  std::vector<Pointer> pointers;
};

// How to allocate an output: by a callable, or from the allocator that the static buffer came from.
struct Maker {
  Ref callable;
  c10::Allocator* allocator = nullptr;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  c10::SmallVector<int64_t, 8> sizes, strides;
  c10::DispatchKeySet keys;
};

struct Executable {
  void* handle;
  uint64_t* addresses;  // Where it points, for each place.
  size_t next = 0;  // Which one came after it the last time.
};

struct Graph {
  std::shared_ptr<Driver> driver;
  void* captured = nullptr;  // The CUgraph; Python's, as the first executable.
  std::vector<Executable> executables;
  std::unique_ptr<uint64_t[]> addresses;  // Of all executables but the first.
  size_t most = 1;  // How many executables there may be.
  size_t expected = 0;  // The one to launch next.
  size_t last = 0;  // The one launched last.
  size_t hand = 0;  // Where the search for one to patch begins.
  uint64_t streak = 0;  // Launches in a row that needed a patch.
  uint64_t alone = 0;  // Patches, less those after a launch of another graph.
  std::vector<Place> places;  // Inputs, then outputs.
  size_t inputs = 0;
  std::vector<Maker> makers;
  Words target;  // The layout of the first output.
  Ref slots, pointed;  // What holds the memory behind the pointers, and that of the first executable's addresses.
  Ref ready;  // The outputs of the next call, or null.
  uint64_t ready_stream = 0;  // Where they were allocated, and whether in inference mode.
  bool ready_inference = false;

  size_t outputs() const { return places.size() - inputs; }
};

struct GraphObject {
  PyObject_HEAD
  Graph* graph;
};

PyTypeObject* graph_type;

PyObject* make(Maker& maker) {
  HANDLE_TH_ERRORS
  if (maker.callable) return PyObject_CallNoArgs(maker.callable.get());
  return THPVariable_Wrap(
      at::detail::empty_strided_generic(maker.sizes, maker.strides, maker.allocator, maker.keys, maker.dtype));
  END_HANDLE_TH_ERRORS
}

// Fails if the object is no plain tensor of a caching allocator.
bool make_as(PyObject* buffer, Maker& maker) {
  c10::TensorImpl* tensor = plain(buffer);
  if (tensor == nullptr || (maker.allocator = tensor->unsafe_storage().allocator()) == nullptr) return false;
  maker.dtype = tensor->dtype().toScalarType();
  maker.sizes = tensor->sizes();
  maker.strides = tensor->strides();
  maker.keys = c10::DispatchKeySet(tensor->is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  return true;
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

// The first executable, whose addresses stand in an array of Python's, and room for the others.
bool read_first(PyObject* handle, PyObject* pointed, Graph& graph) {
  Py_buffer view;
  if (PyObject_GetBuffer(pointed, &view, PyBUF_CONTIG) < 0) return false;
  auto* addresses = static_cast<uint64_t*>(view.buf);
  const bool fits = view.itemsize == sizeof(uint64_t) &&
      static_cast<size_t>(view.len) == sizeof(uint64_t) * graph.places.size();
  PyBuffer_Release(&view);
  if (!fits || graph.most < 1 || graph.most > 64) {
    PyErr_SetString(PyExc_TypeError, "expected one address for each place, and 1 to 64 executables");
    return false;
  }
  graph.executables.reserve(graph.most);
  graph.executables.push_back({pointer_of(handle), addresses});
  graph.addresses = std::make_unique<uint64_t[]>((graph.most - 1) * graph.places.size());
  return !PyErr_Occurred();
}

// (captured, executable, pointed, most, slots, places, buffers, makers); None where outputs cannot be made here.
PyObject* make_graph(std::shared_ptr<Driver> driver, PyObject* given) {
  PyObject *captured, *executable, *pointed, *slots, *places, *buffers, *makers;
  auto graph = std::make_unique<Graph>();
  if (!PyArg_ParseTuple(given, "OOOKOO!O!O!:graph", &captured, &executable, &pointed, &graph->most, &slots,
                        &PyTuple_Type, &places, &PyTuple_Type, &buffers, &PyTuple_Type, &makers))
    return nullptr;
  const Py_ssize_t all = PyTuple_GET_SIZE(places), count = PyTuple_GET_SIZE(buffers);
  if (count < 1 || count > most_outputs || all - count < 1 || all - count > most_inputs ||
      PyTuple_GET_SIZE(makers) != count)
    Py_RETURN_NONE;
  graph->driver = std::move(driver);
  graph->captured = pointer_of(captured);
  graph->slots = Py_NewRef(slots);
  graph->pointed = Py_NewRef(pointed);
  graph->inputs = static_cast<size_t>(all - count);
  graph->places.resize(static_cast<size_t>(all));
  for (Py_ssize_t i = 0; i < all; ++i)
    if (!read_place(PyTuple_GET_ITEM(places, i), graph->places[static_cast<size_t>(i)])) return nullptr;
  if (!read_first(executable, pointed, *graph)) return nullptr;
  graph->makers.resize(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    Maker& maker = graph->makers[static_cast<size_t>(i)];
    if (PyTuple_GET_ITEM(makers, i) != Py_None)
      maker.callable = Py_NewRef(PyTuple_GET_ITEM(makers, i));
    else if (!make_as(PyTuple_GET_ITEM(buffers, i), maker))
      Py_RETURN_NONE;
  }
  c10::TensorImpl* target = plain(PyTuple_GET_ITEM(buffers, 0));
  if (target == nullptr) Py_RETURN_NONE;
  describe_one(*target, graph->target);
  auto* made = reinterpret_cast<GraphObject*>(graph_type->tp_alloc(graph_type, 0));
  if (made != nullptr) made->graph = graph.release();
  return reinterpret_cast<PyObject*>(made);
}

int graph_traverse(GraphObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (self->graph == nullptr) return 0;
  for (Ref* ref : {&self->graph->slots, &self->graph->pointed, &self->graph->ready}) Py_VISIT(ref->get());
  for (Maker& maker : self->graph->makers) Py_VISIT(maker.callable.get());
  return 0;
}

// By then its CudaGraph was closed, so that nothing is launched or patched any more.
int graph_clear(GraphObject* self) {
  if (self->graph == nullptr) return 0;
  Ref slots(std::move(self->graph->slots)), pointed(std::move(self->graph->pointed));
  Ref ready(std::move(self->graph->ready));
  std::vector<Maker> makers(std::move(self->graph->makers));
  return 0;
}

void graph_dealloc(GraphObject* self) {
  PyObject_GC_UnTrack(self);
  graph_clear(self);
  delete self->graph;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// Destroys every executable that was made here, also if the driver refuses one; none may be running.
PyObject* graph_close(GraphObject* self, PyObject*) {
  Graph& graph = *self->graph;
  int failed = 0;
  while (graph.executables.size() > 1) {
    void* handle = graph.executables.back().handle;
    graph.executables.pop_back();
    if (const int code = graph.driver->destroy(handle); code != 0) failed = code;
  }
  graph.most = 1;
  graph.expected = graph.last = graph.hand = 0;
  graph_clear(self);
  if (failed == 0) Py_RETURN_NONE;
  graph.driver->raise("cuGraphExecDestroy", failed);
  return nullptr;
}

// A list of (handle, [address, ...]), Python's first.
PyObject* graph_executables(GraphObject* self, PyObject*) {
  const Graph& graph = *self->graph;
  Ref found(PyList_New(0));
  for (const Executable& each : graph.executables) {
    Ref addresses(found ? PyList_New(static_cast<Py_ssize_t>(graph.places.size())) : nullptr);
    if (!addresses) return nullptr;
    for (size_t i = 0; i < graph.places.size(); ++i)
      PyList_SET_ITEM(addresses.get(), static_cast<Py_ssize_t>(i), PyLong_FromUnsignedLongLong(each.addresses[i]));
    Ref row(Py_BuildValue("KO", reinterpret_cast<unsigned long long>(each.handle), addresses.get()));
    if (!row || PyList_Append(found.get(), row.get()) < 0) return nullptr;
  }
  return found.release();
}

PyMethodDef graph_methods[] = {
    {"close", reinterpret_cast<PyCFunction>(graph_close), METH_NOARGS, "Destroy the executables that were made here."},
    {"executables", reinterpret_cast<PyCFunction>(graph_executables), METH_NOARGS, "All of them, and where they point."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot graph_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(graph_dealloc)},
                             {Py_tp_traverse, reinterpret_cast<void*>(graph_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(graph_clear)},
                             {Py_tp_methods, graph_methods},
                             {0, nullptr}};

PyType_Spec graph_spec = {"_graphcache_hit.Graph", sizeof(GraphObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, graph_slots};

}  // namespace
