// The guard of a graph: what must stay as it is for the graph to be right, compared by identity and without running any
// Python code.
#pragma once

#include "dicts.h"
#include "objects.h"
#include "tensors.h"

typedef struct {
  PyObject_HEAD
  Py_ssize_t count;
  PyObject *held;  // a list of all that the entries borrow; NULL before the first one
  int cleared;     // by the garbage collector: holds nothing any more
  Dicts dicts;
  Objects objects;
  Tensors tensors;
} Guard;

static PyTypeObject *guard_type;

static int holds(Guard *self) {
  return !self->cleared && same_dicts(&self->dicts) && same_objects(&self->objects) && same_tensors(&self->tensors);
}

static PyObject *guard_holds(Guard *self, PyObject *unused UNUSED) {
  return PyBool_FromLong(holds(self));
}

static Py_ssize_t guard_length(Guard *self) { return self->count; }

// Keeps what a method was given for as long as there are entries. Returns -1 with an exception.
static int keep(Guard *self, PyObject *given) {
  if (self->held == NULL && (self->held = PyList_New(0)) == NULL) return -1;
  return PyList_Append(self->held, given);
}

static PyObject *added(Guard *self, int failed) {
  if (failed) return NULL;
  self->count++;
  Py_RETURN_NONE;
}

static int are_strings(PyObject *names) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i)
    if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(names, i))) return 0;
  return 1;
}

// Adds a dictionary: all of it, or some names.
static PyObject *add_some(Guard *self, PyObject *args, const char *format, int some) {
  PyObject *dict;
  Expected expected = {0};
  if (!PyArg_ParseTuple(args, format, &PyDict_Type, &dict, &PyTuple_Type, &expected.keys, &PyTuple_Type,
                        &expected.values, some ? &PyTuple_Type : &PyMemberDescr_Type,
                        some ? &expected.absent : &expected.slot, &PyTuple_Type, &expected.skipped))
    return NULL;
  const Py_ssize_t keys = PyTuple_GET_SIZE(expected.keys), values = PyTuple_GET_SIZE(expected.values);
  if (keys != values) return PyErr_Format(PyExc_ValueError, "%zd keys and %zd values", keys, values);
  if (expected.absent != NULL && (!are_strings(expected.keys) || !are_strings(expected.absent)))
    return PyErr_Format(PyExc_TypeError, "names are strings");
  return added(self, keep(self, args) || add_dict(&self->dicts, dict, expected));
}

static PyObject *guard_add_dict(Guard *self, PyObject *args) { return add_some(self, args, "O!O!O!|O!O!:add_dict", 0); }

static PyObject *guard_add_names(Guard *self, PyObject *args) { return add_some(self, args, "O!O!O!O!:add_names", 1); }

static PyObject *guard_add_unwritten(Guard *self, PyObject *dict) {
  if (!PyDict_Check(dict)) return PyErr_Format(PyExc_TypeError, "%.100s is no dict", Py_TYPE(dict)->tp_name);
  return added(self, keep(self, dict) || add_dict(&self->dicts, dict, (Expected){0}));
}

static PyObject *add_one(Guard *self, PyObject *args, Kind kind, Object entry) {
  if (keep(self, args) || RESERVE(&self->objects, 1)) return NULL;
  entry.kind = kind;
  self->objects.items[self->objects.count++] = entry;
  return added(self, 0);
}

#define ADDS(name, kind, format, ...)                                              \
  static PyObject *guard_##name(Guard *self, PyObject *args) {                     \
    Object entry = {0};                                                            \
    if (!PyArg_ParseTuple(args, format ":" #name, __VA_ARGS__)) return NULL;       \
    return add_one(self, args, kind, entry);                                       \
  }

ADDS(add_cell, A_CELL, "O!|O", &PyCell_Type, &entry.object, &entry.expected)
ADDS(add_list, A_LIST, "O!O!", &PyList_Type, &entry.object, &PyTuple_Type, &entry.expected)
ADDS(add_iterable, AN_ITERABLE, "OO!O!", &entry.object, &PyType_Type, &entry.descriptor, &PyTuple_Type, &entry.expected)
ADDS(add_variable, A_VARIABLE, "O!|O", &PyContextVar_Type, &entry.object, &entry.expected)
ADDS(add_property, A_PROPERTY, "OO!O", &entry.object, &PyGetSetDescr_Type, &entry.descriptor, &entry.expected)
ADDS(add_class, A_CLASS, "OO!", &entry.object, &PyType_Type, &entry.expected)
ADDS(add_dict_of, A_DICT_OF, "OO!", &entry.object, &PyDict_Type, &entry.expected)

static PyObject *guard_add_slot(Guard *self, PyObject *args) {
  Object entry = {0};
  PyObject *descriptor;
  if (!PyArg_ParseTuple(args, "OO!|O:add_slot", &entry.object, &PyMemberDescr_Type, &descriptor, &entry.expected))
    return NULL;
  const PyMemberDef *member = ((PyMemberDescrObject *)descriptor)->d_member;
  int relative = 0;
#ifdef Py_RELATIVE_OFFSET
  relative = member->flags & Py_RELATIVE_OFFSET;
#endif
  if ((member->type != T_OBJECT && member->type != T_OBJECT_EX) || relative)
    return PyErr_Format(PyExc_TypeError, "%R holds no object", descriptor);
  if (!PyObject_TypeCheck(entry.object, PyDescr_TYPE(descriptor)))
    return PyErr_Format(PyExc_TypeError, "%R is not of %.100s", descriptor, Py_TYPE(entry.object)->tp_name);
  entry.descriptor = descriptor;
  return add_one(self, args, A_SLOT, entry);
}

static PyObject *guard_add_function(Guard *self, PyObject *args) {
  Object entry = {0};
  if (!PyArg_ParseTuple(args, "O!O!:add_function", &PyFunction_Type, &entry.object, &PyTuple_Type, &entry.expected))
    return NULL;
  if (PyTuple_GET_SIZE(entry.expected) != 3) return PyErr_Format(PyExc_ValueError, "expected code and two defaults");
  return add_one(self, args, A_FUNCTION, entry);
}

static PyObject *guard_add_answer(Guard *self, PyObject *args) {
  Object entry = {0};
  if (!PyArg_ParseTuple(args, "O!O:add_answer", &PyCFunction_Type, &entry.object, &entry.expected)) return NULL;
  if (PyCFunction_GET_FLAGS(entry.object) != METH_NOARGS)
    return PyErr_Format(PyExc_TypeError, "%R takes arguments", entry.object);
  return add_one(self, args, AN_ANSWER, entry);
}

static PyObject *guard_add_tensor(Guard *self, PyObject *tensor) {
  return added(self, keep(self, tensor) || add_tensor(&self->tensors, tensor));
}

static int guard_traverse(Guard *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->held);
  return 0;
}

static int guard_clear(Guard *self) {
  // First: what dies may run any code, which may ask.
  self->cleared = 1;
  Py_CLEAR(self->held);
  return 0;
}

// Every add_ method adds one entry and takes references to what it is given. That an entry differs does not mean that its
// value does. A TypeError says that a guard does not compare such an object.
static PyMethodDef guard_methods[] = {
    {"add_dict", (PyCFunction)guard_add_dict, METH_VARARGS,
     "(dict, keys, values, slot, names): these as they were put in, but for these names and objects with None there."},
    {"add_names", (PyCFunction)guard_add_names, METH_VARARGS,
     "(dict, names, values, absent): it holds these under these names, and nothing under others; more keys may change."},
    {"add_unwritten", (PyCFunction)guard_add_unwritten, METH_O, "A dictionary that nobody writes to from now on."},
    {"add_list", (PyCFunction)guard_add_list, METH_VARARGS, "(list, values): these in this order."},
    {"add_iterable", (PyCFunction)guard_add_iterable, METH_VARARGS,
     "(object, class, values): the iterator of this class of it, which runs no Python code, shows these."},
    {"add_cell", (PyCFunction)guard_add_cell, METH_VARARGS, "(cell, value): empty if none is given."},
    {"add_variable", (PyCFunction)guard_add_variable, METH_VARARGS, "(ContextVar, value): not set if none is given."},
    {"add_property", (PyCFunction)guard_add_property, METH_VARARGS, "(object, a descriptor in C, value)"},
    {"add_slot", (PyCFunction)guard_add_slot, METH_VARARGS, "(object, descriptor, value): unset if none is given."},
    {"add_class", (PyCFunction)guard_add_class, METH_VARARGS, "(object, class)"},
    {"add_dict_of", (PyCFunction)guard_add_dict_of, METH_VARARGS, "(object, its __dict__)"},
    {"add_function", (PyCFunction)guard_add_function, METH_VARARGS, "(function, (code, defaults, keyword defaults))"},
    {"add_answer", (PyCFunction)guard_add_answer, METH_VARARGS,
     "(built-in function without arguments, answer): the same object, or an equal string or tuple."},
    {"add_tensor", (PyCFunction)guard_add_tensor, METH_O, "A dense one: its memory, layout, dtype and dispatch keys."},
    {"holds", (PyCFunction)guard_holds, METH_NOARGS, "Whether no entry differs."},
    {NULL, NULL, 0, NULL},
};

static void guard_dealloc(Guard *self) {
  PyObject_GC_UnTrack(self);
  void *lists[] = {self->dicts.dicts.items, self->dicts.expected.items, self->objects.items, self->tensors.items,
                   self->tensors.numbers.items};
  for (size_t i = 0; i < sizeof lists / sizeof *lists; ++i) PyMem_Free(lists[i]);
  free_object((PyObject *)self);
}

static PyType_Slot guard_slots[] = {
    {Py_tp_dealloc, guard_dealloc}, {Py_tp_traverse, guard_traverse}, {Py_tp_clear, guard_clear},
    {Py_tp_methods, guard_methods}, {Py_sq_length, guard_length}, {0, NULL}};

static PyType_Spec guard_spec = {"_graphcache.Guard", sizeof(Guard), 0, GC_TYPE, guard_slots};
