// The lock of a StreamOrder.
#pragma once

#include "objects.h"

namespace {

// What threading.RLock is, but that whether it is free is a question of the GIL alone: without it nobody looks or writes.
// Who has to wait sleeps at a gate, which is closed but for the moment in which somebody is let through.
struct Lock {
  PyObject_HEAD
  unsigned long owner;
  Py_ssize_t count, waiting;
  bool called;
  PyThread_type_lock gate;
  const void* launched_last;  // The graph of the order that native code launched last; compared, never followed.

  bool take() {
    const unsigned long me = PyThread_get_thread_ident();
    if (count != 0 && owner != me) return false;
    owner = me;
    ++count;
    return true;
  }

  // False, with an exception, if the handler of a signal raised meanwhile. Should the gate have been opened for this
  // thread just then, it stays open: whoever waits next passes it once in vain.
  bool wait() {
    while (!take()) {
      PyLockStatus status;
      ++waiting;
      Py_BEGIN_ALLOW_THREADS
      status = PyThread_acquire_lock_timed(gate, -1, 1);
      Py_END_ALLOW_THREADS
      --waiting;
      if (status == PY_LOCK_ACQUIRED)
        called = false;
      else if (PyErr_CheckSignals() < 0)
        return false;
    }
    return true;
  }

  bool give_back() {
    if (count == 0 || owner != PyThread_get_thread_ident()) return false;
    if (--count == 0 && waiting != 0 && !called) {
      called = true;
      PyThread_release_lock(gate);
    }
    return true;
  }
};

PyTypeObject* lock_type;

PyObject* lock_new(PyTypeObject* type, PyObject* given, PyObject* names) {
  if (PyTuple_GET_SIZE(given) != 0 || (names != nullptr && PyDict_GET_SIZE(names) != 0))
    return PyErr_Format(PyExc_TypeError, "Lock() takes no arguments");
  auto* made = reinterpret_cast<Lock*>(type->tp_alloc(type, 0));
  if (made == nullptr) return nullptr;
  made->gate = PyThread_allocate_lock();
  if (made->gate == nullptr) {
    Py_DECREF(made);
    return PyErr_NoMemory();
  }
  PyThread_acquire_lock(made->gate, NOWAIT_LOCK);
  return reinterpret_cast<PyObject*>(made);
}

void lock_dealloc(PyObject* self) {
  auto* lock = reinterpret_cast<Lock*>(self);
  if (lock->gate != nullptr) {
    PyThread_release_lock(lock->gate);
    PyThread_free_lock(lock->gate);
  }
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* lock_acquire(PyObject* self, PyObject* given) {
  int blocking = 1;
  if (!PyArg_ParseTuple(given, "|p:acquire", &blocking)) return nullptr;
  auto* lock = reinterpret_cast<Lock*>(self);
  if (!blocking) return PyBool_FromLong(lock->take());
  if (!lock->wait()) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* lock_enter(PyObject* self, PyObject*) {
  if (!reinterpret_cast<Lock*>(self)->wait()) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* lock_release(PyObject* self, PyObject*) {
  if (reinterpret_cast<Lock*>(self)->give_back()) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError, "this thread does not hold the lock that it releases");
}

PyObject* lock_exit(PyObject* self, PyObject* const*, Py_ssize_t) { return lock_release(self, nullptr); }

PyMethodDef lock_methods[] = {
    {"acquire", lock_acquire, METH_VARARGS, "Take it; whether it was taken. Waits unless told not to."},
    {"release", lock_release, METH_NOARGS, "Give it back, as often as it was taken."},
    {"__enter__", lock_enter, METH_NOARGS, nullptr},
    {"__exit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lock_exit)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot lock_slots[] = {{Py_tp_new, reinterpret_cast<void*>(lock_new)},
                            {Py_tp_dealloc, reinterpret_cast<void*>(lock_dealloc)},
                            {Py_tp_methods, lock_methods},
                            {0, nullptr}};

PyType_Spec lock_spec = {"_graphcache_hit.Lock", sizeof(Lock), 0, Py_TPFLAGS_DEFAULT, lock_slots};

// An order's lock, taken without waiting and given back at the end.
class Held {
 public:
  explicit Held(Lock& lock) : lock_(lock), held_(lock.take()) {}
  ~Held() {
    if (held_) lock_.give_back();
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  explicit operator bool() const { return held_; }

 private:
  Lock& lock_;
  const bool held_;
};

}  // namespace
