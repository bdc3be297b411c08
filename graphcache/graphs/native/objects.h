// Python objects from C++: references, and attributes at a fixed place.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#ifdef Py_GIL_DISABLED
#error "not for free-threaded Python: the GIL guards what is read and written here"
#endif

#include <torch/csrc/utils/object_ptr.h>

#include <cstdint>

namespace {

using Ref = THPObjectPtr;

constexpr uint64_t unknown = ~uint64_t{0};

// An attribute that stands in __slots__ of a class.
struct Field {
  PyTypeObject* type = nullptr;  // Borrowed: the table holds its classes.
  Py_ssize_t offset = 0;

  bool find(PyObject* cls, const char* name) {
    Ref descriptor(PyObject_GetAttrString(cls, name));
    if (!descriptor) return false;
    if (!PyType_Check(cls) || !Py_IS_TYPE(descriptor.get(), &PyMemberDescr_Type)) {
      PyErr_Format(PyExc_TypeError, "%R has no slot %s", cls, name);
      return false;
    }
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.get())->d_member;
    if (member->type != T_OBJECT_EX || (member->flags & READONLY)) {
      PyErr_Format(PyExc_TypeError, "%s of %R is no plain slot", name, cls);
      return false;
    }
    type = PyDescr_TYPE(descriptor.get());
    offset = member->offset;
    return true;
  }

  bool is_of(PyObject* object) const { return PyObject_TypeCheck(object, type); }

  PyObject*& in(PyObject* object) const {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
  }

  // Takes over the reference to the value.
  void put(PyObject* object, PyObject* value) const {
    PyObject*& place = in(object);
    PyObject* before = place;
    place = value;
    Py_XDECREF(before);
  }

  // A whole number as it stands there: -1, and whatever is none, are no address and no stream.
  uint64_t number(PyObject* object) const {
    PyObject* value = in(object);
    if (value == nullptr || !PyLong_CheckExact(value)) return unknown;
    const uint64_t found = PyLong_AsUnsignedLongLongMask(value);
    if (found == unknown) PyErr_Clear();
    return found;
  }
};

}  // namespace
