// The guard of a graph: what must stay as it is for the graph to be right, compared by identity and without running any
// Python code. Plain C without torch's headers, so that it compiles in under a second and serves every version of torch.
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

// ---- comparing

static Py_ssize_t first_difference(Guard *self) {
  if (self->cleared) return 0;
  const Py_ssize_t found[] = {items_difference(&self->dicts), order_difference(&self->dicts),
                              objects_difference(&self->objects), tensors_difference(&self->tensors)};
  Py_ssize_t first = NONE_DIFFERS;
  for (int i = 0; i < 4; ++i) first = found[i] < first ? found[i] : first;
  return first;
}

static PyObject *guard_holds(Guard *self, PyObject *unused) {
  (void)unused;
  return PyBool_FromLong(first_difference(self) == NONE_DIFFERS);
}

static PyObject *guard_changed(Guard *self, PyObject *unused) {
  (void)unused;
  const Py_ssize_t first = first_difference(self);
  return PyLong_FromSsize_t(first == NONE_DIFFERS ? -1 : first);
}

static Py_ssize_t guard_length(Guard *self) { return self->count; }

// ---- adding

static PyObject *added(Guard *self, int failed) {
  if (failed) return NULL;
  self->count++;
  Py_RETURN_NONE;
}

static PyObject *added_dict(Guard *self, PyObject *dict, Expected expected) {
  const Py_ssize_t keys = PyTuple_GET_SIZE(expected.keys), values = PyTuple_GET_SIZE(expected.values);
  if (keys != values) return PyErr_Format(PyExc_ValueError, "%zd keys and %zd values", keys, values);
  expected.index = self->count;
  return added(self, add_dict(&self->dicts, dict, expected));
}

static PyObject *guard_add_dict(Guard *self, PyObject *args) {
  PyObject *dict, *keys, *values;
  if (!PyArg_ParseTuple(args, "O!O!O!:add_dict", &PyDict_Type, &dict, &PyTuple_Type, &keys, &PyTuple_Type, &values))
    return NULL;
  return added_dict(self, dict, (Expected){.keys = keys, .values = values});
}

static int are_strings(PyObject *names) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i)
    if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(names, i))) return 0;
  return 1;
}

static PyObject *guard_add_names(Guard *self, PyObject *args) {
  PyObject *dict, *names, *values, *absent;
  if (!PyArg_ParseTuple(args, "O!O!O!O!:add_names", &PyDict_Type, &dict, &PyTuple_Type, &names, &PyTuple_Type, &values,
                        &PyTuple_Type, &absent))
    return NULL;
  if (!are_strings(names) || !are_strings(absent)) return PyErr_Format(PyExc_TypeError, "names are strings");
  return added_dict(self, dict, (Expected){.keys = names, .values = values, .absent = absent});
}

static PyObject *guard_add_items(Guard *self, PyObject *args) {
  PyObject *object, *values;
  Kind kind;
  if (!PyArg_ParseTuple(args, "OO!:add_items", &object, &PyTuple_Type, &values)) return NULL;
  if (PyList_Check(object)) kind = A_LIST;
  else if (PyAnySet_Check(object)) kind = A_SET;
  else if (PyObject_TypeCheck(object, deque_type)) kind = A_DEQUE;
  else return PyErr_Format(PyExc_TypeError, "%.100s is no list, deque or set", Py_TYPE(object)->tp_name);
  const Object entry = {.kind = kind, .index = self->count, .object = object, .expected = values};
  return added(self, add_object(&self->objects, entry));
}

static PyObject *guard_add_cell(Guard *self, PyObject *args) {
  PyObject *cell, *value = NULL;
  if (!PyArg_ParseTuple(args, "O!|O:add_cell", &PyCell_Type, &cell, &value)) return NULL;
  const Object entry = {.kind = A_CELL, .index = self->count, .object = cell, .expected = value};
  return added(self, add_object(&self->objects, entry));
}

static PyObject *guard_add_slot(Guard *self, PyObject *args) {
  PyObject *object, *descriptor, *value = NULL;
  if (!PyArg_ParseTuple(args, "OO!|O:add_slot", &object, &PyMemberDescr_Type, &descriptor, &value)) return NULL;
  const PyMemberDef *member = ((PyMemberDescrObject *)descriptor)->d_member;
  int readable_flags = 0;
#ifdef Py_RELATIVE_OFFSET
  readable_flags = member->flags & Py_RELATIVE_OFFSET;
#endif
  if ((member->type != T_OBJECT && member->type != T_OBJECT_EX) || readable_flags != 0)
    return PyErr_Format(PyExc_TypeError, "%R holds no object", descriptor);
  if (!PyObject_TypeCheck(object, PyDescr_TYPE(descriptor)))
    return PyErr_Format(PyExc_TypeError, "%R is not of %.100s", descriptor, Py_TYPE(object)->tp_name);
  const Object entry = {
      .kind = A_SLOT, .index = self->count, .object = object, .expected = value, .descriptor = descriptor};
  return added(self, add_object(&self->objects, entry));
}

static PyObject *guard_add_class(Guard *self, PyObject *args) {
  PyObject *object, *type;
  if (!PyArg_ParseTuple(args, "OO!:add_class", &object, &PyType_Type, &type)) return NULL;
  const Object entry = {.kind = A_CLASS, .index = self->count, .object = object, .expected = type};
  return added(self, add_object(&self->objects, entry));
}

static PyObject *guard_add_dict_of(Guard *self, PyObject *args) {
  PyObject *object, *dict;
  if (!PyArg_ParseTuple(args, "OO!:add_dict_of", &object, &PyDict_Type, &dict)) return NULL;
  const Object entry = {.kind = A_DICT_OF, .index = self->count, .object = object, .expected = dict};
  return added(self, add_object(&self->objects, entry));
}

static PyObject *guard_add_function(Guard *self, PyObject *args) {
  PyObject *function, *parts;
  if (!PyArg_ParseTuple(args, "O!O!:add_function", &PyFunction_Type, &function, &PyTuple_Type, &parts)) return NULL;
  if (PyTuple_GET_SIZE(parts) != 3) return PyErr_Format(PyExc_ValueError, "expected code, defaults and kwdefaults");
  const Object entry = {.kind = A_FUNCTION, .index = self->count, .object = function, .expected = parts};
  return added(self, add_object(&self->objects, entry));
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

static PyMethodDef guard_methods[] = {
    {"add_dict", (PyCFunction)guard_add_dict, METH_VARARGS, NULL},
    {"add_names", (PyCFunction)guard_add_names, METH_VARARGS, NULL},
    {"add_items", (PyCFunction)guard_add_items, METH_VARARGS, NULL},
    {"add_cell", (PyCFunction)guard_add_cell, METH_VARARGS, NULL},
    {"add_slot", (PyCFunction)guard_add_slot, METH_VARARGS, NULL},
    {"add_class", (PyCFunction)guard_add_class, METH_VARARGS, NULL},
    {"add_dict_of", (PyCFunction)guard_add_dict_of, METH_VARARGS, NULL},
    {"add_function", (PyCFunction)guard_add_function, METH_VARARGS, NULL},
    {"add_tensor", (PyCFunction)guard_add_tensor, METH_O, NULL},
    {"holds", (PyCFunction)guard_holds, METH_NOARGS, NULL},
    {"changed", (PyCFunction)guard_changed, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot guard_slots[] = {
    {Py_tp_dealloc, free_object},
    {Py_tp_traverse, guard_traverse},
    {Py_tp_clear, guard_clear},
    {Py_tp_methods, guard_methods},
    {Py_sq_length, guard_length},
    {0, NULL},
};

static PyType_Spec guard_spec = {
    .name = "_graphcache.Guard",
    .basicsize = sizeof(Guard),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = guard_slots,
};
