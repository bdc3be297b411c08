// The native half of a CudaGraph: where its tensors' addresses stand, its executables, and the outputs of its next call.
//
// The first executable is Python's, and so is the array that says where it points; both ways keep that right. The others
// are made, pointed, launched and destroyed here alone. Whoever reads or writes any of this holds the order's lock.
#pragma once

#include "driver.h"
#include "lock.h"

// A place in the graph where an address stands, as param_patching.py found it.
typedef struct {
  int kernel;
  void *node, *params, *context;
  uint64_t *word;
  long long offset;
} Pointer;

// An input or output.
typedef struct {
  unsigned long long mask, nbytes;
  Pointer *pointers;
  Py_ssize_t count;
} Place;

typedef struct {
  void *handle;
  uint64_t *addresses;  // where it points, for each place
  size_t next;          // which one came after it the last time
} Executable;

typedef struct {
  PyObject_HEAD
  PyObject *held;    // what holds the memory behind the pointers, and that of the first executable's addresses
  PyObject *makers;  // in `held`: a callable and its arguments for each output
  void *captured;    // the CUgraph; Python's, as the first executable
  Executable *executables;
  uint64_t *addresses;  // of all executables but the first
  size_t count;
  unsigned long long most;  // how many executables there may be
  size_t expected;          // the one to launch next
  size_t last;              // the one launched last
  size_t hand;              // where the search for one to patch begins
  uint64_t streak;          // launches in a row that needed a patch
  uint64_t alone;           // patches, less those after a launch of another graph
  Place places[MOST_PLACES];
  size_t inputs, outputs, all;
  uint64_t target[1 + 2 * MOST_RANK];  // the layout of the first output
  size_t target_words;
  PyObject *ready;  // the outputs of the next call, or NULL
  uint64_t ready_at[MOST_OUTPUTS], ready_stream;
  int ready_inference;
} Graph;

static PyTypeObject *graph_type;

static int read_pointer(PyObject *given, Pointer *pointer) {
  PyObject *node, *params, *context, *word;
  if (!PyTuple_Check(given) || !PyArg_ParseTuple(given, "pOOOOL:pointer", &pointer->kernel, &node, &params, &context,
                                                 &word, &pointer->offset))
    return -1;
  pointer->node = PyLong_AsVoidPtr(node), pointer->params = PyLong_AsVoidPtr(params), pointer->context = PyLong_AsVoidPtr(context);
  pointer->word = PyLong_AsVoidPtr(word);
  return PyErr_Occurred() != NULL ? -1 : 0;
}

// (mask, nbytes, ((kernel, node, params, context, word, offset), ...))
static int read_place(PyObject *given, Place *place) {
  PyObject *pointers;
  if (!PyTuple_Check(given) ||
      !PyArg_ParseTuple(given, "KKO!:place", &place->mask, &place->nbytes, &PyTuple_Type, &pointers))
    return -1;
  const Py_ssize_t count = PyTuple_GET_SIZE(pointers);
  if (count == 0 || (place->pointers = PyMem_Calloc((size_t)count, sizeof(Pointer))) == NULL) return -1;
  for (; place->count < count; ++place->count)
    if (read_pointer(PyTuple_GET_ITEM(pointers, place->count), place->pointers + place->count)) return -1;
  return 0;
}

// The first executable, whose addresses stand in an array of Python's, and room for the others.
static int read_first(PyObject *handle, PyObject *pointed, Graph *graph) {
  Py_buffer view;
  if (PyObject_GetBuffer(pointed, &view, PyBUF_CONTIG) < 0) return -1;
  uint64_t *addresses = view.buf;
  const int fits = view.itemsize == sizeof(uint64_t) && (size_t)view.len == sizeof(uint64_t) * graph->all;
  PyBuffer_Release(&view);
  if (!fits || graph->most < 1 || graph->most > 64) return -1;
  graph->executables = PyMem_Calloc(graph->most, sizeof(Executable));
  graph->addresses = PyMem_Calloc(graph->most * graph->all, sizeof(uint64_t));
  if (graph->executables == NULL || graph->addresses == NULL) return -1;
  graph->executables[0] = (Executable){.handle = PyLong_AsVoidPtr(handle), .addresses = addresses};
  graph->count = 1;
  return PyErr_Occurred() != NULL ? -1 : 0;
}

// What (captured, executable, pointed, most, slots, places, first output, makers) say. Returns -1 for anything else,
// and 1 where there are too many inputs or outputs, or the output is not plain.
static int read_graph(Graph *graph, PyObject *given) {
  PyObject *captured, *executable, *pointed, *slots, *places, *output;
  if (!PyArg_ParseTuple(given, "OOOKOO!OO!:graph", &captured, &executable, &pointed, &graph->most, &slots,
                        &PyTuple_Type, &places, &output, &PyTuple_Type, &graph->makers))
    return -1;
  const Py_ssize_t all = PyTuple_GET_SIZE(places), outputs = PyTuple_GET_SIZE(graph->makers);
  if (outputs < 1 || outputs > MOST_OUTPUTS || all - outputs < 1 || all - outputs > MOST_INPUTS) return 1;
  if ((graph->held = PyTuple_Pack(3, pointed, slots, graph->makers)) == NULL) return -1;
  graph->captured = PyLong_AsVoidPtr(captured);
  graph->all = (size_t)all, graph->outputs = (size_t)outputs, graph->inputs = (size_t)(all - outputs);
  for (size_t i = 0; i < graph->all; ++i)
    if (read_place(PyTuple_GET_ITEM(places, (Py_ssize_t)i), graph->places + i)) return -1;
  for (size_t i = 0; i < graph->outputs; ++i) {
    PyObject *maker = PyTuple_GET_ITEM(graph->makers, (Py_ssize_t)i);
    if (!PyTuple_Check(maker) || PyTuple_GET_SIZE(maker) != 2 || !PyTuple_Check(PyTuple_GET_ITEM(maker, 1))) return -1;
  }
  if (read_first(executable, pointed, graph)) return -1;
  Words words = {0};
  if (!describe_one(output, &words)) return 1;
  memcpy(graph->target, words.at, words.count * sizeof *words.at);
  graph->target_words = words.count;
  return 0;
}

static PyObject *make_graph(PyObject *module UNUSED, PyObject *given) {
  OWNED PyObject *made = graph_type->tp_alloc(graph_type, 0);
  if (made == NULL) return NULL;
  const int refused = read_graph((Graph *)made, given);
  if (refused > 0) Py_RETURN_NONE;
  if (refused < 0 && !PyErr_Occurred())
    PyErr_SetString(PyExc_TypeError, "expected places with pointers, an address for each, makers, 1 to 64 executables");
  return refused < 0 ? NULL : Py_NewRef(made);
}

static int graph_traverse(Graph *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->held);
  Py_VISIT(self->ready);
  return 0;
}

// By then its CudaGraph was closed, so that nothing is launched or patched any more.
static int graph_clear(Graph *self) {
  Py_CLEAR(self->held);
  Py_CLEAR(self->ready);
  return 0;
}

static void graph_dealloc(Graph *self) {
  PyObject_GC_UnTrack(self);
  for (size_t i = 0; i < MOST_PLACES; ++i) PyMem_Free(self->places[i].pointers);
  PyMem_Free(self->executables);
  PyMem_Free(self->addresses);
  free_object((PyObject *)self);
}

// Destroys every executable that was made here, also if the driver refuses one; none may be running.
static PyObject *graph_close(Graph *self, PyObject *unused UNUSED) {
  int failed = 0;
  while (self->count > 1) {
    const int code = driver.destroy(self->executables[--self->count].handle);
    if (code != 0) failed = code;
  }
  self->most = 1;
  self->expected = self->last = self->hand = 0;
  graph_clear(self);
  if (failed == 0) Py_RETURN_NONE;
  refused("cuGraphExecDestroy", failed);
  return NULL;
}

// A list of (handle, (address, ...)), Python's first.
static PyObject *graph_executables(Graph *self, PyObject *unused UNUSED) {
  OWNED PyObject *found = PyList_New(0);
  for (size_t i = 0; found != NULL && i < self->count; ++i) {
    const Executable *each = self->executables + i;
    OWNED PyObject *row = Py_BuildValue("KN", (unsigned long long)each->handle, tuple_of(each->addresses, self->all));
    if (row == NULL || PyList_Append(found, row) < 0) return NULL;
  }
  return Py_XNewRef(found);
}

static PyMethodDef graph_methods[] = {
    {"close", (PyCFunction)graph_close, METH_NOARGS, "Destroy the executables that were made here."},
    {"executables", (PyCFunction)graph_executables, METH_NOARGS, "All of them, and where they point."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot graph_slots[] = {
    {Py_tp_dealloc, graph_dealloc}, {Py_tp_traverse, graph_traverse}, {Py_tp_clear, graph_clear},
    {Py_tp_methods, graph_methods}, {0, NULL}};

static PyType_Spec graph_spec = {"_graphcache.Graph", sizeof(Graph), 0, GC_TYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, graph_slots};
