// Two methods of CachedModule, __call__ and forward_into, are Python functions whose calls come here first. What reads
// their code, such as torch.compile, finds it as it was written, and what is left alone here runs it. Python 3.11 enters
// forward_into by itself where the caller is Python too, so its code asks the table again; _graphcache_into does not.
#pragma once

#include "table.h"

// Kept for good.
static struct {
  vectorcallfunc call, into;
  PyObject *hooks, *pre_hooks, *compiler;
  PyObject *own_hooks, *own_pre_hooks, *compiling, *into_name, *table;  // names
} doors;

static int holds_any(PyObject *dict, PyObject *name) {
  PyObject *found = PyDict_GetItemWithError(dict, name);
  return found == NULL || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0;
}

// The table of a module that has one, with no hooks to be run and nothing being compiled; otherwise NULL.
static PyObject *table_of(PyObject *module) {
  if (PyDict_GET_SIZE(doors.hooks) != 0 || PyDict_GET_SIZE(doors.pre_hooks) != 0 ||
      PyDict_GetItemWithError(doors.compiler, doors.compiling) != Py_False)
    return NULL;
  OWNED PyObject *dict = PyObject_GenericGetDict(module, NULL);
  if (dict == NULL) return NULL;
  PyObject *table = PyDict_GetItemWithError(dict, doors.table);
  if (table == NULL || !Py_IS_TYPE(table, table_type) || holds_any(dict, doors.own_hooks) ||
      holds_any(dict, doors.own_pre_hooks))
    return NULL;
  return Py_NewRef(table);
}

// The table of the module that is called with at least some arguments, all of them by position; otherwise NULL.
static PyObject *table_for(PyObject *const *args, size_t given, PyObject *names, Py_ssize_t least) {
  if (PyVectorcall_NARGS(given) < least || (names != NULL && PyTuple_GET_SIZE(names) != 0)) return NULL;
  PyObject *table = table_of(args[0]);
  if (table == NULL) PyErr_Clear();
  return table;
}

static PyObject *door_call(PyObject *function, PyObject *const *args, size_t given, PyObject *names) {
  OWNED PyObject *table = table_for(args, given, names, 2);
  PyObject *result = NULL;
  if (table == NULL || answer((Table *)table, NULL, args + 1, PyVectorcall_NARGS(given) - 1, &result) == LEFT_ALONE)
    return doors.call(function, args, given, names);
  return result;
}

static PyObject *door_into(PyObject *function, PyObject *const *args, size_t given, PyObject *names) {
  OWNED PyObject *table = table_for(args, given, names, 3);
  PyObject *result = NULL;
  if (table == NULL) return doors.into(function, args, given, names);
  if (answer((Table *)table, args[1], args + 2, PyVectorcall_NARGS(given) - 2, &result) == LEFT_ALONE)
    return PyObject_VectorcallMethod(doors.into_name, args, (size_t)PyVectorcall_NARGS(given), NULL);
  return result;
}

static void set_door(PyObject *function, vectorcallfunc door, vectorcallfunc *before) {
  PyFunctionObject *made = (PyFunctionObject *)function;
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
static PyObject *open_doors(PyObject *module UNUSED, PyObject *given) {
  PyObject *call, *into, *hooks, *pre_hooks, *compiler;
  if (!PyArg_ParseTuple(given, "O!O!O!O!O!:open", &PyFunction_Type, &call, &PyFunction_Type, &into, &PyDict_Type,
                        &hooks, &PyDict_Type, &pre_hooks, &PyDict_Type, &compiler))
    return NULL;
  PyObject **places[] = {&doors.own_hooks, &doors.own_pre_hooks, &doors.compiling, &doors.into_name, &doors.table};
  const char *texts[] = {"_forward_hooks", "_forward_pre_hooks", "_is_compiling_flag", "_graphcache_into",
                         "_graphcache_table"};
  for (size_t i = 0; i < sizeof places / sizeof *places; ++i)
    if (*places[i] == NULL && (*places[i] = PyUnicode_InternFromString(texts[i])) == NULL) return NULL;
  Py_XSETREF(doors.hooks, Py_NewRef(hooks));
  Py_XSETREF(doors.pre_hooks, Py_NewRef(pre_hooks));
  Py_XSETREF(doors.compiler, Py_NewRef(compiler));
  set_door(call, door_call, &doors.call);
  set_door(into, door_into, &doors.into);
  Py_RETURN_NONE;
}
