// What all parts use: references, arrays that grow, object lifetimes, and attributes at a fixed place.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

#ifdef Py_GIL_DISABLED
#error "not for free-threaded Python: the GIL guards what is read and written here"
#endif

#define UNKNOWN UINT64_MAX  // no address, no stream and no number

#define UNUSED __attribute__((unused))  // a parameter that CPython's signature asks for

// A local reference, given back at the end of its block.
static void give_back(void *reference) { Py_XDECREF(*(PyObject **)reference); }
#define OWNED __attribute__((cleanup(give_back)))

// Makes room for `more` items of `size` bytes. Returns -1 with MemoryError set if there is no memory.
static int reserve(void **items, Py_ssize_t count, Py_ssize_t *capacity, Py_ssize_t more, size_t size) {
  if (count + more <= *capacity) return 0;
  const Py_ssize_t wanted = (count + more) * 2 + 8;
  void *grown = PyMem_Realloc(*items, (size_t)wanted * size);
  if (grown == NULL) {
    PyErr_NoMemory();
    return -1;
  }
  *items = grown;
  *capacity = wanted;
  return 0;
}

#define RESERVE(list, more) \
  reserve((void **)&(list)->items, (list)->count, &(list)->capacity, (more), sizeof *(list)->items)

// The end of an object that takes part in garbage collection: whatever tp_clear leaves is freed with it.
static void free_object(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (type->tp_clear != NULL) type->tp_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

#define GC_TYPE (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE)

// An attribute that stands in __slots__ of a class.
typedef struct {
  PyTypeObject *type;  // borrowed: who has the field holds its class
  Py_ssize_t offset;
} Field;

static int find_field(Field *field, PyObject *class, const char *name) {
  OWNED PyObject *found = PyObject_GetAttrString(class, name);
  if (found == NULL) return -1;
  const PyMemberDef *member = Py_IS_TYPE(found, &PyMemberDescr_Type) ? ((PyMemberDescrObject *)found)->d_member : NULL;
  if (member == NULL || member->type != T_OBJECT_EX || (member->flags & READONLY)) {
    PyErr_Format(PyExc_TypeError, "%s of %R is no plain slot", name, class);
    return -1;
  }
  *field = (Field){PyDescr_TYPE(found), member->offset};
  return 0;
}

static inline int is_of(Field field, PyObject *object) { return PyObject_TypeCheck(object, field.type); }

static inline PyObject **field_of(Field field, PyObject *object) {
  return (PyObject **)((char *)object + field.offset);
}

// Takes over the reference to the value.
static inline void put_in(Field field, PyObject *object, PyObject *value) {
  PyObject **place = field_of(field, object), *before = *place;
  *place = value;
  Py_XDECREF(before);
}

// A whole number as it stands in a field; UNKNOWN for what is none.
static inline uint64_t number_in(Field field, PyObject *object) {
  PyObject *value = *field_of(field, object);
  if (value == NULL || !PyLong_CheckExact(value)) return UNKNOWN;
  const uint64_t found = PyLong_AsUnsignedLongLongMask(value);
  if (found == UNKNOWN) PyErr_Clear();
  return found;
}

static PyObject *const *items_of(PyObject *tuple) { return ((PyTupleObject *)tuple)->ob_item; }

static PyObject *tuple_of(const uint64_t *numbers, size_t count) {
  PyObject *made = PyTuple_New((Py_ssize_t)count);
  for (size_t i = 0; made != NULL && i < count; ++i) {
    PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);
    if (number == NULL) Py_CLEAR(made);
    else PyTuple_SET_ITEM(made, (Py_ssize_t)i, number);
  }
  return made;
}
