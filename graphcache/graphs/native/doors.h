// The way in: two methods of CachedModule whose calls come here before they come to Python.
#pragma once

#include "answer.h"

#include <iterator>

namespace {

// Two methods of CachedModule, __call__ and forward_into, are Python functions whose calls come here first. What reads
// their code, such as torch.compile, finds it as it was written, and what is left alone here runs it. Python 3.11 enters
// forward_into by itself where the caller is Python too, so its code asks the table again; _graphcache_into does not.
struct Doors {
  vectorcallfunc call, into;
  PyObject *hooks, *pre_hooks, *compiler;  // Kept for good, as everything here.
  PyObject *table, *own_hooks, *own_pre_hooks, *compiling, *into_name;
} doors;

bool holds(PyObject* dict, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  return found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0;
}

// The table of a module that has one, with no hooks to be run and nothing being compiled; otherwise null.
PyObject* table_of(PyObject* module) {
  if (PyDict_GET_SIZE(doors.hooks) != 0 || PyDict_GET_SIZE(doors.pre_hooks) != 0 ||
      PyDict_GetItemWithError(doors.compiler, doors.compiling) != Py_False)
    return nullptr;
  Ref dict(PyObject_GenericGetDict(module, nullptr));
  if (!dict) return nullptr;
  PyObject* table = PyDict_GetItemWithError(dict.get(), doors.table);
  if (table == nullptr || !Py_IS_TYPE(table, table_type) || holds(dict.get(), doors.own_hooks) ||
      holds(dict.get(), doors.own_pre_hooks))
    return nullptr;
  return Py_NewRef(table);
}

bool are_plain(size_t given, PyObject* names, Py_ssize_t least) {
  return PyVectorcall_NARGS(given) >= least && (names == nullptr || PyTuple_GET_SIZE(names) == 0);
}

PyObject* door_call(PyObject* function, PyObject* const* args, size_t given, PyObject* names) {
  HANDLE_TH_ERRORS
  Ref table(are_plain(given, names, 2) ? table_of(args[0]) : nullptr);
  if (!table) {
    PyErr_Clear();
    return doors.call(function, args, given, names);
  }
  Ref result;
  const auto outcome = answer(*reinterpret_cast<Table*>(table.get())->state, args + 1, PyVectorcall_NARGS(given) - 1,
                              nullptr, result);
  if (outcome == Outcome::left_alone) return doors.call(function, args, given, names);
  return outcome == Outcome::done ? result.release() : nullptr;
  END_HANDLE_TH_ERRORS
}

PyObject* door_into(PyObject* function, PyObject* const* args, size_t given, PyObject* names) {
  HANDLE_TH_ERRORS
  Ref table(are_plain(given, names, 3) ? table_of(args[0]) : nullptr);
  if (!table) {
    PyErr_Clear();
    return doors.into(function, args, given, names);
  }
  const auto outcome = answer_into(*reinterpret_cast<Table*>(table.get())->state, args[1], args + 2,
                                   PyVectorcall_NARGS(given) - 2);
  if (outcome == Outcome::left_alone)
    return PyObject_VectorcallMethod(doors.into_name, args, static_cast<size_t>(PyVectorcall_NARGS(given)), nullptr);
  return outcome == Outcome::done ? Py_NewRef(args[1]) : nullptr;
  END_HANDLE_TH_ERRORS
}

void set_door(PyObject* function, vectorcallfunc door, vectorcallfunc* before) {
  auto* made = reinterpret_cast<PyFunctionObject*>(function);
  if (made->vectorcall == door) return;
  *before = made->vectorcall;
#if PY_VERSION_HEX >= 0x030C0000
  // The interpreter has to look at it, where it would have gone into the function by itself.
  PyFunction_SetVectorcall(made, door);
#else
  made->vectorcall = door;
#endif
}

// (__call__, forward_into, global hooks, global pre-hooks, the dictionary of torch.compiler)
PyObject* module_open(PyObject*, PyObject* given) {
  PyObject *call, *into, *hooks, *pre_hooks, *compiler;
  if (!PyArg_ParseTuple(given, "O!O!O!O!O!:open", &PyFunction_Type, &call, &PyFunction_Type, &into, &PyDict_Type,
                        &hooks, &PyDict_Type, &pre_hooks, &PyDict_Type, &compiler))
    return nullptr;
  if (doors.table == nullptr) {
    PyObject** const places[] = {&doors.own_hooks, &doors.own_pre_hooks, &doors.compiling, &doors.into_name,
                                 &doors.table};
    const char* const texts[] = {"_forward_hooks", "_forward_pre_hooks", "_is_compiling_flag", "_graphcache_into",
                                 "_graphcache_table"};
    for (size_t i = 0; i < std::size(places); ++i)
      if ((*places[i] = PyUnicode_InternFromString(texts[i])) == nullptr) return nullptr;
  }
  Py_XSETREF(doors.hooks, Py_NewRef(hooks));
  Py_XSETREF(doors.pre_hooks, Py_NewRef(pre_hooks));
  Py_XSETREF(doors.compiler, Py_NewRef(compiler));
  set_door(call, door_call, &doors.call);
  set_door(into, door_into, &doors.into);
  Py_RETURN_NONE;
}

}  // namespace
