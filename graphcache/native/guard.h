// The guard of a graph: what must stay as it is for the graph to be right, compared by identity and without running any
// Python code.
#pragma once

#include "dicts.h"
#include "objects.h"
#include "tensors.h"

typedef struct {
  PyObject_HEAD
  Py_ssize_t count;
  int cleared;  // by the garbage collector: holds nothing any more
  Dicts dicts;
  Objects objects;
  Tensors tensors;
} Guard;

static PyTypeObject *guard_type;

// ---- comparing

// The number of the first entry that differs; -1 if none does.
static Py_ssize_t difference(Guard *self) {
  if (self->cleared) return 0;
  const Py_ssize_t found[] = {dicts_difference(&self->dicts), objects_difference(&self->objects),
                              tensors_difference(&self->tensors)};
  Py_ssize_t first = NONE_DIFFERS;
  for (int i = 0; i < 3; ++i) first = found[i] < first ? found[i] : first;
  return first == NONE_DIFFERS ? -1 : first;
}

static PyObject *guard_holds(Guard *self, PyObject *unused) {
  (void)unused;
  return PyBool_FromLong(difference(self) < 0);
}

static PyObject *guard_changed(Guard *self, PyObject *unused) {
  (void)unused;
  return PyLong_FromSsize_t(difference(self));
}

static Py_ssize_t guard_length(Guard *self) { return self->count; }

// ---- adding

static PyObject *added(Guard *self, int failed) {
  if (failed) return NULL;
  self->count++;
  Py_RETURN_NONE;
}

static PyObject *add_some(Guard *self, PyObject *dict, Expected expected) {
  const Py_ssize_t keys = PyTuple_GET_SIZE(expected.keys), values = PyTuple_GET_SIZE(expected.values);
  if (keys != values) return PyErr_Format(PyExc_ValueError, "%zd keys and %zd values", keys, values);
  expected.index = self->count;
  return added(self, add_dict(&self->dicts, dict, expected));
}

static PyObject *guard_add_dict(Guard *self, PyObject *args) {
  PyObject *dict;
  Expected expected = {0};
  if (!PyArg_ParseTuple(args, "O!O!O!:add_dict", &PyDict_Type, &dict, &PyTuple_Type, &expected.keys, &PyTuple_Type,
                        &expected.values))
    return NULL;
  return add_some(self, dict, expected);
}

static int are_strings(PyObject *names) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i)
    if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(names, i))) return 0;
  return 1;
}

static PyObject *guard_add_names(Guard *self, PyObject *args) {
  PyObject *dict;
  Expected expected = {0};
  if (!PyArg_ParseTuple(args, "O!O!O!O!:add_names", &PyDict_Type, &dict, &PyTuple_Type, &expected.keys, &PyTuple_Type,
                        &expected.values, &PyTuple_Type, &expected.absent))
    return NULL;
  if (!are_strings(expected.keys) || !are_strings(expected.absent))
    return PyErr_Format(PyExc_TypeError, "names are strings");
  return add_some(self, dict, expected);
}

// Adds an object of a kind, if its arguments were parsed.
static PyObject *add_one(Guard *self, Kind kind, int parsed, Object entry) {
  if (!parsed) return NULL;
  entry.kind = kind;
  entry.index = self->count;
  return added(self, add_object(&self->objects, entry));
}

static PyObject *guard_add_items(Guard *self, PyObject *args) {
  Object entry = {0};
  if (!PyArg_ParseTuple(args, "OO!:add_items", &entry.object, &PyTuple_Type, &entry.expected)) return NULL;
  const int is_list = PyList_Check(entry.object);
  if (!is_list && !PyAnySet_Check(entry.object))
    return PyErr_Format(PyExc_TypeError, "%.100s is no list or set", Py_TYPE(entry.object)->tp_name);
  return add_one(self, is_list ? A_LIST : A_SET, 1, entry);
}

#define ADDS(name, kind, format, ...)                                              \
  static PyObject *guard_##name(Guard *self, PyObject *args) {                     \
    Object entry = {0};                                                            \
    const int parsed = PyArg_ParseTuple(args, format ":" #name, __VA_ARGS__);      \
    return add_one(self, kind, parsed, entry);                                     \
  }

ADDS(add_cell, A_CELL, "O!|O", &PyCell_Type, &entry.object, &entry.expected)
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
  return add_one(self, A_SLOT, 1, entry);
}

static PyObject *guard_add_function(Guard *self, PyObject *args) {
  Object entry = {0};
  if (!PyArg_ParseTuple(args, "O!O!:add_function", &PyFunction_Type, &entry.object, &PyTuple_Type, &entry.expected))
    return NULL;
  if (PyTuple_GET_SIZE(entry.expected) != 3) return PyErr_Format(PyExc_ValueError, "expected code and two defaults");
  return add_one(self, A_FUNCTION, 1, entry);
}

static PyObject *guard_add_answer(Guard *self, PyObject *args) {
  Object entry = {0};
  if (!PyArg_ParseTuple(args, "O!O:add_answer", &PyCFunction_Type, &entry.object, &entry.expected)) return NULL;
  if (PyCFunction_GET_FLAGS(entry.object) != METH_NOARGS)
    return PyErr_Format(PyExc_TypeError, "%R takes arguments", entry.object);
  return add_one(self, AN_ANSWER, 1, entry);
}

static PyObject *guard_add_tensor(Guard *self, PyObject *tensor) {
  return added(self, add_tensor(&self->tensors, tensor, self->count));
}

// ---- the type

static int guard_traverse(Guard *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  int stopped = visit_dicts(&self->dicts, visit, arg);
  if (!stopped) stopped = visit_objects(&self->objects, visit, arg);
  return stopped ? stopped : visit_tensors(&self->tensors, visit, arg);
}

static int guard_clear(Guard *self) {
  self->cleared = 1;
  clear_dicts(&self->dicts);
  clear_objects(&self->objects);
  clear_tensors(&self->tensors);
  return 0;
}

// Every add_ method adds one entry and takes references to what it is given. That an entry differs does not mean that its
// value does. A TypeError says that a guard does not compare such an object.
static PyMethodDef guard_methods[] = {
    {"add_dict", (PyCFunction)guard_add_dict, METH_VARARGS,
     "(dict, keys, values): it holds these in this order; of an OrderedDict one entry at most."},
    {"add_names", (PyCFunction)guard_add_names, METH_VARARGS,
     "(dict, names, values, absent): it holds these under these names, and nothing under others; more keys may change."},
    {"add_items", (PyCFunction)guard_add_items, METH_VARARGS, "(list or set, values): these in this order."},
    {"add_cell", (PyCFunction)guard_add_cell, METH_VARARGS, "(cell, value): empty if none is given."},
    {"add_slot", (PyCFunction)guard_add_slot, METH_VARARGS, "(object, descriptor, value): unset if none is given."},
    {"add_class", (PyCFunction)guard_add_class, METH_VARARGS, "(object, class)"},
    {"add_dict_of", (PyCFunction)guard_add_dict_of, METH_VARARGS, "(object, its __dict__)"},
    {"add_function", (PyCFunction)guard_add_function, METH_VARARGS, "(function, (code, defaults, keyword defaults))"},
    {"add_answer", (PyCFunction)guard_add_answer, METH_VARARGS,
     "(built-in function without arguments, answer): the same object, or an equal string or tuple."},
    {"add_tensor", (PyCFunction)guard_add_tensor, METH_O, "A dense one: its memory, layout, dtype and dispatch keys."},
    {"holds", (PyCFunction)guard_holds, METH_NOARGS, "Whether no entry differs."},
    {"changed", (PyCFunction)guard_changed, METH_NOARGS, "The first entry that differs, by its number; -1 if none."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot guard_slots[] = {{Py_tp_dealloc, free_object},
                                    {Py_tp_traverse, guard_traverse},
                                    {Py_tp_clear, guard_clear},
                                    {Py_tp_methods, guard_methods},
                                    {Py_sq_length, guard_length},
                                    {0, NULL}};

static PyType_Spec guard_spec = {"_graphcache.Guard", sizeof(Guard), 0, GC_TYPE, guard_slots};
