// What has no watcher and is compared at every call: lists, what else has an iterator in C, closure cells, context
// variables, slots, properties in C, classes, which dictionary holds an object's attributes, what functions of torch say.
#pragma once

#include "base.h"

typedef enum {
  A_LIST, AN_ITERABLE, A_CELL, A_VARIABLE, A_SLOT, A_PROPERTY, A_CLASS, A_DICT_OF, A_FUNCTION, AN_ANSWER
} Kind;

typedef struct {
  Kind kind;
  PyObject *object;
  PyObject *expected;    // a tuple of what holds several; NULL where a cell, variable or slot is expected to be empty
  PyObject *descriptor;  // of A_SLOT and A_PROPERTY; of AN_ITERABLE the class whose iterator shows the items
} Object;

typedef struct {
  Object *items;
  Py_ssize_t count, capacity;
} Objects;

static int same_pointers(PyObject *const *found, PyObject *tuple) {
  const size_t count = (size_t)PyTuple_GET_SIZE(tuple);
  return count == 0 || memcmp(found, items_of(tuple), count * sizeof *found) == 0;
}

static int same_list(PyObject *list, PyObject *expected) {
  return PyList_GET_SIZE(list) == PyTuple_GET_SIZE(expected) &&
         same_pointers(((PyListObject *)list)->ob_item, expected);
}

static int same_iterable(PyObject *object, PyTypeObject *class, PyObject *expected) {
  const Py_ssize_t count = PyTuple_GET_SIZE(expected);
  // Every module has an empty set.
  if (PyAnySet_Check(object) && PySet_GET_SIZE(object) == 0) return count == 0;
  if (class->tp_iter == NULL || !PyObject_TypeCheck(object, class)) return 0;
  OWNED PyObject *items = class->tp_iter(object);
  int same = items != NULL;
  for (Py_ssize_t i = 0; same && i <= count; ++i) {
    OWNED PyObject *item = PyIter_Next(items);
    same = item == (i < count ? PyTuple_GET_ITEM(expected, i) : NULL);
  }
  PyErr_Clear();
  return same;
}

static int same_variable(PyObject *variable, PyObject *expected) {
  OWNED PyObject *found = NULL;
  if (PyContextVar_Get(variable, NULL, &found)) PyErr_Clear();
  return found == expected;
}

static int same_slot(PyObject *object, PyObject *descriptor, PyObject *expected) {
  // The class may have been replaced by one with other slots at the same place.
  if (!PyObject_TypeCheck(object, PyDescr_TYPE(descriptor))) return 0;
  const PyMemberDef *member = ((PyMemberDescrObject *)descriptor)->d_member;
  PyObject *found = *(PyObject **)((char *)object + member->offset);
  if (found == NULL && member->type == T_OBJECT) found = Py_None;
  return found == expected;
}

static int same_property(PyObject *object, PyObject *descriptor, PyObject *expected) {
  if (!PyObject_TypeCheck(object, PyDescr_TYPE(descriptor))) return 0;
  const PyGetSetDef *property = ((PyGetSetDescrObject *)descriptor)->d_getset;
  OWNED PyObject *found = property->get(object, property->closure);
  if (found == NULL) PyErr_Clear();
  return found == expected;
}

static int same_dict_of(PyObject *object, PyObject *expected) {
  // Makes a dictionary only for an object that lost its own; the answer is then no.
  PyObject **found = _PyObject_GetDictPtr(object);
  return found != NULL && *found == expected;
}

// Code and default values; None stands for defaults that are not there.
static int same_function(PyObject *object, PyObject *expected) {
  const PyFunctionObject *function = (PyFunctionObject *)object;
  PyObject *found[] = {function->func_code, function->func_defaults, function->func_kwdefaults};
  for (Py_ssize_t i = 0; i < 3; ++i)
    if ((found[i] == NULL ? Py_None : found[i]) != PyTuple_GET_ITEM(expected, i)) return 0;
  return 1;
}

// What a built-in function says: the same object, text or tuple. One that raises is the caller's to ask.
static int same_answer(PyObject *function, PyObject *expected) {
  OWNED PyObject *found = PyCFunction_GET_FUNCTION(function)(PyCFunction_GET_SELF(function), NULL);
  if (found == expected) return 1;
  const int comparable = found != NULL && Py_TYPE(found) == Py_TYPE(expected) &&
                         (PyUnicode_CheckExact(found) || PyTuple_CheckExact(found));
  const int same = comparable && PyObject_RichCompareBool(found, expected, Py_EQ) > 0;
  if (!same) PyErr_Clear();
  return same;
}

static inline int same_object(const Object *each) {
  switch (each->kind) {
    case A_LIST: return same_list(each->object, each->expected);
    case AN_ITERABLE: return same_iterable(each->object, (PyTypeObject *)each->descriptor, each->expected);
    case A_CELL: return PyCell_GET(each->object) == each->expected;
    case A_VARIABLE: return same_variable(each->object, each->expected);
    case A_SLOT: return same_slot(each->object, each->descriptor, each->expected);
    case A_PROPERTY: return same_property(each->object, each->descriptor, each->expected);
    case A_CLASS: return (PyObject *)Py_TYPE(each->object) == each->expected;
    case A_DICT_OF: return same_dict_of(each->object, each->expected);
    case A_FUNCTION: return same_function(each->object, each->expected);
    case AN_ANSWER: return same_answer(each->object, each->expected);
  }
  return 0;
}

static int same_objects(const Objects *all) {
  for (Py_ssize_t i = 0; i < all->count; ++i)
    if (!same_object(all->items + i)) return 0;
  return 1;
}
