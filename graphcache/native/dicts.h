// Dictionaries: the same keys and values in the same order, or only the same values of some names. One that nobody wrote
// to is not looked into: CPython counts writes in a version tag (up to 3.13) and reports them to a watcher (3.12 and
// later).
#pragma once

#include "objects.h"

// CPython calls the version tag deprecated since 3.12; 3.14 has none.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#if PY_VERSION_HEX < 0x030E0000
#define VERSION_TAG(dict) ((dict)->ma_version_tag)
#else
#define VERSION_TAG(dict) ((uint64_t)0)
#endif

// Whether tags and watchers report every write. CPython 3.13.0 misses some; probe.py finds out.
static int shortcuts = 1;

// Advances at every write to a dictionary of any guard. A guard that found everything unchanged remembers it.
static uint64_t epoch = 1;
static int watcher = -1;

#if PY_VERSION_HEX >= 0x030C0000
static int count_write(PyDict_WatchEvent event, PyObject *dict UNUSED, PyObject *key UNUSED, PyObject *value UNUSED) {
  // A dictionary that a guard looks at is alive, since the guard holds a reference.
  if (event != PyDict_EVENT_DEALLOCATED) epoch++;
  return 0;
}

static void start_watcher(void) {
  watcher = PyDict_AddWatcher(count_write);
  // CPython has eight watchers. Without one, version tags are compared.
  if (watcher < 0) PyErr_Clear();
}

static int watch(PyObject *dict) { return watcher < 0 ? 0 : PyDict_Watch(watcher, dict); }
#else
static void start_watcher(void) {}
#define watch(dict) 0
#endif

// ---- the dictionaries of a guard

// What every call reads is apart from what is read after a write.
typedef struct {
  PyObject *dict;
  uint64_t tag;  // when its items were last compared; 0 if never
} Dict;

typedef struct {
  PyObject *keys, *values;  // NULL where no write is allowed
  PyObject *absent;  // names that must be missing, where other keys do not matter; NULL where all keys do
  PyObject *slot;    // where objects in it that hold None there are left out; or NULL
  PyObject *skipped;  // keys that are left out; or NULL
} Expected;

typedef struct {
  struct {
    Dict *items;
    Py_ssize_t count, capacity;
  } dicts;
  struct {
    Expected *items;
    Py_ssize_t count, capacity;
  } expected;
  uint64_t epoch;  // when all were last compared
} Dicts;

// Names are strings, so no Python code runs, unless another key has the hash of a name and an __eq__ of its own.
static int same_names(PyObject *dict, const Expected *expected) {
  PyObject *keys = expected->keys, *values = expected->values, *absent = expected->absent;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); ++i)
    if (PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(keys, i)) != PyTuple_GET_ITEM(values, i)) goto differs;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(absent); ++i)
    if (PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(absent, i)) != NULL || PyErr_Occurred()) goto differs;
  return 1;
differs:
  PyErr_Clear();
  return 0;
}

static int is_among(PyObject *object, PyObject *tuple) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
    if (PyTuple_GET_ITEM(tuple, i) == object) return 1;
  return 0;
}

static int same_items(PyObject *dict, const Expected *expected) {
  Py_ssize_t at = 0, position = 0, count = PyTuple_GET_SIZE(expected->keys);
  PyObject *key, *value, *keys = expected->keys, *values = expected->values;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (expected->slot != NULL && same_slot(value, expected->slot, Py_None)) continue;
    if (expected->skipped != NULL && is_among(key, expected->skipped)) continue;
    if (at >= count || PyTuple_GET_ITEM(keys, at) != key || PyTuple_GET_ITEM(values, at++) != value) return 0;
  }
  return at == count;
}

static int same_dicts(Dicts *all) {
  const uint64_t now = epoch;
  if (shortcuts && watcher >= 0 && all->epoch == now) return 1;
  for (Py_ssize_t i = 0; i < all->dicts.count; ++i) {
    const Dict each = all->dicts.items[i];
    const uint64_t tag = VERSION_TAG((PyDictObject *)each.dict);
    if (shortcuts && tag != 0 && each.tag == tag) continue;
    const Expected *expected = all->expected.items + i;
    if (expected->keys == NULL || !(expected->absent != NULL ? same_names : same_items)(each.dict, expected)) return 0;
    all->dicts.items[i].tag = tag;
  }
  all->epoch = now;
  return 1;
}

static int add_dict(Dicts *all, PyObject *dict, Expected added) {
  if (RESERVE(&all->dicts, 1) || RESERVE(&all->expected, 1) || watch(dict)) return -1;
  const uint64_t tag = added.keys == NULL && shortcuts ? VERSION_TAG((PyDictObject *)dict) : 0;
  if (added.keys == NULL && tag == 0) {
    PyErr_SetString(PyExc_TypeError, "this Python does not count what is written to a dictionary");
    return -1;
  }
  all->dicts.items[all->dicts.count++] = (Dict){dict, tag};
  all->expected.items[all->expected.count++] = added;
  all->epoch = 0;
  return 0;
}
