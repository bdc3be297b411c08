// What all parts of a guard use: arrays that grow, and the index that means "no entry differs".
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef Py_GIL_DISABLED
#error "a guard relies on the GIL: it reads containers without locks"
#endif

#define NONE_DIFFERS PY_SSIZE_T_MAX

static inline Py_ssize_t smaller(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

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

static inline PyObject *const *tuple_items(PyObject *tuple) { return ((PyTupleObject *)tuple)->ob_item; }

static inline int same_pointers(PyObject *const *found, PyObject *tuple) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  return count == 0 || memcmp(found, tuple_items(tuple), (size_t)count * sizeof *found) == 0;
}
