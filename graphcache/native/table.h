// The table of a module's graphs, and the launch of a session, as Python sees them.
#pragma once

#include "hit.h"

static PyTypeObject *table_type;

// The answer to a tuple of arguments, or None.
static PyObject *table_call(Table *self, PyObject *args) {
  PyObject *result = NULL;
  if (!PyTuple_CheckExact(args)) Py_RETURN_NONE;
  const Outcome outcome = answer(self, NULL, items_of(args), PyTuple_GET_SIZE(args), &result);
  return outcome == LEFT_ALONE ? Py_NewRef(Py_None) : result;
}

// into(out, args): whether out was written
static PyObject *table_into(Table *self, PyObject *const *given, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "into() takes 2 arguments, %zd were given", count);
  if (!PyTuple_CheckExact(given[1])) Py_RETURN_FALSE;
  OWNED PyObject *result = NULL;
  const Outcome outcome = answer(self, given[0], items_of(given[1]), PyTuple_GET_SIZE(given[1]), &result);
  return outcome == FAILED ? NULL : PyBool_FromLong(outcome == DONE);
}

// Reads what put() is given besides the arguments of a call. Returns -1 for anything else.
static int read_record(Record *record) {
  PyObject *lock, *index;
  unsigned long long context;
  if (!PyArg_ParseTuple(record->held, "OOOO!O!OKO!OOOOOO:put", &record->entry, &record->graph, &record->order, lock_type,
                        &lock, graph_type, &record->native, &index, &context, &PyBytes_Type, &record->updates, &record->build,
                        &record->engine, &record->epoch, &record->guard, &record->ambient, &record->is_stale))
    return -1;
  PyObject **optional[] = {&record->build,  &record->engine,  &record->epoch,
                           &record->guard, &record->ambient, &record->is_stale};
  for (size_t i = 0; i < 6; ++i)
    if (*optional[i] == Py_None) *optional[i] = NULL;
  record->lock = (Lock *)lock;
  record->device = device_of(index, context);
  const int known = is_of(driver.hits, record->entry) && is_of(driver.executable, record->graph) &&
                    is_of(driver.stream, record->order);
  if (!known || (record->engine != NULL && record->epoch == NULL)) return -1;
  if (record->ambient == NULL) return 0;
  const int exact = record->epoch != NULL && PyLong_CheckExact(record->epoch) && record->guard != NULL &&
                    is_of(driver.version, record->guard) && Py_IS_TYPE(record->ambient, guard_type);
  record->version = exact ? PyLong_AsUnsignedLongLong(record->epoch) : UNKNOWN;
  return record->version == UNKNOWN ? -1 : 0;
}

// (args, entry, graph, order, lock, its native half, index, context, state that it updates, build, engine, epoch, guard,
// ambient, is_stale)
static PyObject *table_put(Table *self, PyObject *given) {
  PyObject *args = PyTuple_GET_SIZE(given) == 0 ? NULL : PyTuple_GET_ITEM(given, 0);
  if (args == NULL || !PyTuple_CheckExact(args)) return PyErr_Format(PyExc_TypeError, "expected a tuple of arguments");
  Words words;
  if (!describe(items_of(args), PyTuple_GET_SIZE(args), &words)) Py_RETURN_FALSE;
  USING Record *record = PyMem_Calloc(1, sizeof(Record) + words.count * sizeof *words.at);
  if (record == NULL) return PyErr_NoMemory();
  record->users = 1;
  record->held = PyTuple_GetSlice(given, 1, PyTuple_GET_SIZE(given));
  if (record->held == NULL || read_record(record)) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected an Entry, a CudaGraph, a StreamOrder and its Lock");
    return NULL;
  }
  if ((size_t)PyTuple_GET_SIZE(args) != record->native->inputs) Py_RETURN_FALSE;
  record->hash = hash_of(&words);
  record->count = words.count;
  memcpy(record->words, words.at, words.count * sizeof *words.at);
  Record **place = &self->buckets[record->hash % BUCKETS];
  while (*place != NULL && !same_words((*place)->words, (*place)->count, &words)) place = &(*place)->next;
  // What was there goes at the end: that may run any code.
  Record *before = *place;
  record->next = before == NULL ? NULL : before->next;
  *place = record;
  self->count += before == NULL;
  record = before;
  Py_RETURN_TRUE;
}

static int table_clear(Table *self) {
  self->count = 0;
  for (size_t i = 0; i < BUCKETS; ++i)
    // What dies may run any code, which may add a record.
    for (Record *each; (each = self->buckets[i]) != NULL;) {
      self->buckets[i] = each->next;
      unuse(each);
    }
  return 0;
}

static PyObject *table_clear_method(Table *self, PyObject *unused UNUSED) {
  table_clear(self);
  Py_RETURN_NONE;
}

static Py_ssize_t table_length(Table *self) { return (Py_ssize_t)self->count; }

static PyObject *table_new(PyTypeObject *type, PyObject *given, PyObject *names) {
  if (PyTuple_GET_SIZE(given) != 0 || (names != NULL && PyDict_GET_SIZE(names) != 0))
    return PyErr_Format(PyExc_TypeError, "Table() takes no arguments");
  if (driver.held == NULL) return PyErr_Format(PyExc_RuntimeError, "the driver's functions are not known");
  return type->tp_alloc(type, 0);
}

static int table_traverse(Table *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  for (size_t i = 0; i < BUCKETS; ++i)
    for (Record *each = self->buckets[i]; each != NULL; each = each->next)
      // One that a call is using too is that call's as well, which the collector must not see as nobody's.
      if (each->users == 1) Py_VISIT(each->held);
  return 0;
}

// ---- sessions

static Outcome launch_once(PyObject *const *given) {
  uint64_t stream = 0;
  const Device device = device_of(given[3], PyLong_AsUnsignedLongLong(given[4]));
  Lock *lock = (Lock *)given[2];
  const Outcome known = current_stream(&device, &stream);
  if (known != DONE) return known;
  if (!is_here(&device, stream)) return LEFT_ALONE;
  const int held = hold(lock);
  if (held <= 0) return held < 0 ? FAILED : LEFT_ALONE;
  Outcome outcome = LEFT_ALONE;
  if (is_current(given[0], given[1], stream)) outcome = launch(PyLong_AsVoidPtr(given[5]), stream);
  let_go(lock);
  return outcome;
}

static PyObject *launch_session(PyObject *given, PyObject *unused UNUSED) {
  const Outcome outcome = launch_once(items_of(given));
  if (outcome == LEFT_ALONE) return PyObject_CallNoArgs(PyTuple_GET_ITEM(given, 6));
  return outcome == FAILED ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef session_run = {"run", launch_session, METH_NOARGS, "Launch the session's graph."};

// launcher(graph, order, lock, index, context, executable, otherwise): what launches a graph on its static buffers
static PyObject *make_launcher(PyObject *module UNUSED, PyObject *given) {
  PyObject *graph, *order, *lock, *index, *otherwise;
  unsigned long long context, executable;
  if (!PyArg_ParseTuple(given, "OOO!OKKO:launcher", &graph, &order, lock_type, &lock, &index, &context, &executable,
                        &otherwise))
    return NULL;
  if (driver.held == NULL || !is_of(driver.executable, graph) || !is_of(driver.stream, order))
    return PyErr_Format(PyExc_TypeError, "expected a CudaGraph and a StreamOrder");
  return PyCFunction_New(&session_run, given);
}

static PyMethodDef table_methods[] = {
    {"call", (PyCFunction)table_call, METH_O, "The answer to a tuple of arguments, or None."},
    {"into", (PyCFunction)(void (*)(void))table_into, METH_FASTCALL, "Whether out was written, of out and args."},
    {"put", (PyCFunction)table_put, METH_VARARGS, "Remember a graph; whether there is a way for it."},
    {"clear", (PyCFunction)table_clear_method, METH_NOARGS, "Forget every graph."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot table_slots[] = {
    {Py_tp_new, table_new}, {Py_tp_dealloc, free_object}, {Py_tp_traverse, table_traverse}, {Py_tp_clear, table_clear},
    {Py_tp_methods, table_methods}, {Py_sq_length, table_length}, {0, NULL}};

static PyType_Spec table_spec = {"_graphcache.Table", sizeof(Table), 0, GC_TYPE, table_slots};
