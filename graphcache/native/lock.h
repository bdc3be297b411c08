// The lock of a StreamOrder.
#pragma once

#include "base.h"

// What threading.RLock is, but that whether it is free is a question of the GIL alone: without it nobody looks or writes.
// Who has to wait sleeps at a gate, which is closed but for the moment in which somebody is let through.
//
// An order that was made before the library was loaded has a lock of Python's, which is then taken instead.
typedef struct {
  PyObject_HEAD
  unsigned long owner;
  Py_ssize_t count, waiting;
  int called;
  PyThread_type_lock gate;
  PyObject *acquire, *release;  // of the lock of Python's, or NULL
  const void *launched_last;    // the graph of the order that native code launched last; compared, never followed
} Lock;

static PyTypeObject *lock_type;

static int take(Lock *lock) {
  const unsigned long me = PyThread_get_thread_ident();
  if (lock->count != 0 && lock->owner != me) return 0;
  lock->owner = me;
  ++lock->count;
  return 1;
}

// False, with an exception, if the handler of a signal raised meanwhile. Should the gate have been opened for this
// thread just then, it stays open: whoever waits next passes it once in vain.
static int wait_for(Lock *lock) {
  while (!take(lock)) {
    PyLockStatus status;
    ++lock->waiting;
    Py_BEGIN_ALLOW_THREADS
    status = PyThread_acquire_lock_timed(lock->gate, -1, 1);
    Py_END_ALLOW_THREADS
    --lock->waiting;
    if (status == PY_LOCK_ACQUIRED) lock->called = 0;
    else if (PyErr_CheckSignals() < 0) return 0;
  }
  return 1;
}

static int release(Lock *lock) {
  if (lock->count == 0 || lock->owner != PyThread_get_thread_ident()) return 0;
  if (--lock->count == 0 && lock->waiting != 0 && !lock->called) {
    lock->called = 1;
    PyThread_release_lock(lock->gate);
  }
  return 1;
}

// For native code: takes a lock without waiting. Returns 1 if it was taken, 0 if not, and -1 with an exception.
static int hold(Lock *lock) {
  if (lock->acquire == NULL) return take(lock);
  OWNED PyObject *taken = PyObject_CallOneArg(lock->acquire, Py_False);
  return taken == NULL ? -1 : taken == Py_True;
}

// Gives back what was held, whatever was raised meanwhile.
static void let_go(Lock *lock) {
  if (lock->acquire == NULL) {
    release(lock);
    return;
  }
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  OWNED PyObject *released = PyObject_CallNoArgs(lock->release);
  if (released == NULL) PyErr_WriteUnraisable(lock->release);
  PyErr_Restore(type, value, traceback);
}

// Lock(), or Lock(a lock of Python's)
static PyObject *lock_new(PyTypeObject *type, PyObject *given, PyObject *names) {
  PyObject *python = NULL;
  if (names != NULL && PyDict_GET_SIZE(names) != 0) return PyErr_Format(PyExc_TypeError, "Lock() takes no names");
  if (!PyArg_ParseTuple(given, "|O:Lock", &python)) return NULL;
  OWNED PyObject *object = type->tp_alloc(type, 0);
  if (object == NULL) return NULL;
  Lock *made = (Lock *)object;
  if (python != NULL && ((made->acquire = PyObject_GetAttrString(python, "acquire")) == NULL ||
                         (made->release = PyObject_GetAttrString(python, "release")) == NULL))
    return NULL;
  if ((made->gate = PyThread_allocate_lock()) == NULL) return PyErr_NoMemory();
  PyThread_acquire_lock(made->gate, NOWAIT_LOCK);
  return Py_NewRef(object);
}

static void lock_dealloc(Lock *self) {
  PyTypeObject *type = Py_TYPE(self);
  if (self->gate != NULL) {
    PyThread_release_lock(self->gate);
    PyThread_free_lock(self->gate);
  }
  Py_XDECREF(self->acquire);
  Py_XDECREF(self->release);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *lock_acquire(Lock *self, PyObject *given) {
  int blocking = 1;
  if (!PyArg_ParseTuple(given, "|p:acquire", &blocking)) return NULL;
  if (!blocking) return PyBool_FromLong(take(self));
  return wait_for(self) ? Py_NewRef(Py_True) : NULL;
}

static PyObject *lock_release(Lock *self, PyObject *unused UNUSED) {
  if (release(self)) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError, "this thread does not hold the lock that it releases");
}

static PyObject *lock_exit(Lock *self, PyObject *const *given UNUSED, Py_ssize_t count UNUSED) {
  return lock_release(self, NULL);
}

static PyMethodDef lock_methods[] = {
    {"acquire", (PyCFunction)lock_acquire, METH_VARARGS, "Take it; whether it was taken. Waits unless told not to."},
    {"release", (PyCFunction)lock_release, METH_NOARGS, "Give it back, as often as it was taken."},
    {"__enter__", (PyCFunction)lock_acquire, METH_VARARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lock_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lock_slots[] = {
    {Py_tp_new, lock_new}, {Py_tp_dealloc, lock_dealloc}, {Py_tp_methods, lock_methods}, {0, NULL}};

static PyType_Spec lock_spec = {"_graphcache.Lock", sizeof(Lock), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, lock_slots};
