// Autograd nodes for the kernels that Triton has compiled: what triton_bcn.py, triton_ws.py and
// autograd.py do at each call, at a tenth of the host time. Built by cuda_nodes.py.
//
// Only the usual case is done here. A function returns None for everything else: other types of
// tensors, memory laid out in another way, launches that Triton has not compiled yet. Python's way
// then serves. How kernels are launched for a shape is asked of Python once and kept.

#include "cuda_bcn.h"
#include "cuda_ws.h"

namespace {

// start(address of the driver's cuLaunchKernel or 0, ask)
PyObject* start(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long address;
  if (!PyArg_ParseTuple(arguments, "KO", &address, &ask)) raise_kept();
  Py_INCREF(ask);
  driver = reinterpret_cast<Driver>(address);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject*, PyObject*) {
  std::lock_guard<std::mutex> lock(plans_mutex);
  plans.clear();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"bcn", reinterpret_cast<PyCFunction>(bcn), METH_FASTCALL, nullptr},
    {"takes_bcn", reinterpret_cast<PyCFunction>(takes_bcn), METH_FASTCALL, nullptr},
    {"ws", reinterpret_cast<PyCFunction>(ws), METH_FASTCALL, nullptr},
    {"ws_conv", reinterpret_cast<PyCFunction>(ws_conv), METH_FASTCALL, nullptr},
    {"start", start, METH_VARARGS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "cuda_nodes", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_cuda_nodes() { return PyModule_Create(&module_def); }
