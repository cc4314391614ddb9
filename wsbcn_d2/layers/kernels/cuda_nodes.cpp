// Autograd nodes for the kernels that Triton has compiled: what triton_bcn.py, triton_ws.py and
// autograd.py do at each call, at a tenth of the host time. Built by cuda_nodes.py.
//
// Only the usual case is done here. A function returns None for everything else: other types of
// tensors, memory laid out in another way, launches that Triton has not compiled yet. Python's way
// then serves. How kernels are launched for a shape is asked of Python once and kept.

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "cuda_launch.h"

using torch::autograd::SavedVariable;

namespace {

// -------------------------------------------------------------------------------------------- BCN

// Tensors of Python's tuple, None for those that are absent.
variable_list unpack_all(PyObject* made) {
  Ref owned(made);
  variable_list result;
  for (Py_ssize_t i = 0; i < PyTuple_Size(made); i++) {
    PyObject* item = PyTuple_GET_ITEM(made, i);
    result.push_back(item == Py_None ? Tensor() : THPVariable_Unpack(item));
  }
  return result;
}

struct FusedBCN : torch::autograd::Node {
  std::array<SavedVariable, 6> saved;  // x, weight, bias, bn_weight, bn_bias, stats
  double eps = 0;
  PyObject* readable = nullptr;
  std::mutex mutex;

  std::string name() const override { return "FusedBCN"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& variable : saved) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex);
    Tensor dy = grads[0];
    if (!dy.defined()) return variable_list(5);
    std::array<Tensor, 6> t;
    for (int i = 0; i < 6; i++) t[i] = saved[i].unpack();
    std::array<bool, 5> needs;
    for (size_t i = 0; i < 5; i++) needs[i] = task_should_compute_output(i);
    const bool again = at::GradMode::is_enabled(), bn = needs[3] || needs[4];
    if (!again) {
      variable_list found = launch(dy, t, needs[0], bn, nullptr);
      if (!found.empty()) return trimmed(std::move(found), needs);
    }
    WithGIL gil;
    if (!again) {
      const Tensor& x = t[0];
      variable_list found = launch(
          dy, t, needs[0], bn,
          Py_BuildValue("sNNNNNO", "bcn_backward_plan", wrap(x), wrap(t[1]), wrap(t[3]), wrap(t[4]),
                        wrap(dy), bn ? Py_True : Py_False));
      if (!found.empty()) return trimmed(std::move(found), needs);
    }
    Ref arguments(Py_BuildValue(
        "sONNNNNNNd(OOOOO)", again ? "bcn_graph" : "bcn_slowly", readable, wrap(dy), wrap(t[0]), wrap(t[1]), wrap(t[2]), wrap(t[3]), wrap(t[4]),
        wrap(t[5]), eps, needs[0] ? Py_True : Py_False, needs[1] ? Py_True : Py_False,
        needs[2] ? Py_True : Py_False, needs[3] ? Py_True : Py_False,
        needs[4] ? Py_True : Py_False));
    return trimmed(unpack_all(PyObject_CallObject(ask, arguments.object)), needs);
  }

  static variable_list trimmed(variable_list&& grads, const std::array<bool, 5>& needs) {
    for (int i = 0; i < 5; i++)
      if (!needs[i]) grads[i].reset();
    return std::move(grads);
  }

  // The five gradients; empty if Python's way must serve, or if there is no plan and no arguments
  // to make one with.
  variable_list launch(const Tensor& dy, const std::array<Tensor, 6>& t, bool needs_x, bool bn,
                       PyObject* arguments) {
    const auto &[x, weight, bias, bn_weight, bn_bias, stats] = t;
    const Layout layout = layout_of(x);
    const Key key = {1,
                     x.size(0),
                     x.size(1),
                     x.size(2),
                     x.size(3),
                     layout,
                     weight.numel(),
                     x.device().index(),
                     int(x.scalar_type()) * 1024 + int(dy.scalar_type()),
                     int(weight.scalar_type()),
                     bn_weight.defined() + 2 * bn_bias.defined() + 4 * bn,
                     0};
    Plan* plan = find(key);
    if (plan == nullptr && arguments != nullptr) plan = make(key, arguments);
    if (plan == nullptr || !usual(x, layout) || !usual(dy, layout)) return {};
    at::AutoDispatchBelowADInplaceOrView guard;
    On device(x);
    Tensor d_weight = at::empty_like(weight), d_bias = at::empty_like(weight), d_bn_weight,
           d_bn_bias, dx;
    if (bn) {
      d_bn_weight = at::empty({x.size(1)}, weight.options());
      d_bn_bias = at::empty({x.size(1)}, weight.options());
    }
    Tensor scratch = at::empty({plan->scratch}, weight.options());
    auto& launches = plan->launches;
    launches[0](device.stream, {&dy, &x, &scratch, &stats});
    launches[1](device.stream, {&scratch, &stats, &weight, &bn_weight, &bn_bias, &d_weight, &d_bias,
                                &d_bn_weight, &d_bn_bias});
    if (needs_x) {
      dx = at::empty_like(x);
      launches[2](device.stream, {&dy, &x, &dx, &scratch, &stats});
    }
    return {dx, d_weight, d_bias, d_bn_weight, d_bn_bias};
  }
};

// bcn(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count, bn_eps, rate, eps, readable)
PyObject* bcn(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "bcn takes 12 arguments");
  Tensors tensors;
  if (!tensors.take(arguments)) Py_RETURN_NONE;
  auto& [x, weight, bias, bn_weight, bn_bias, mean, var, batches] = tensors.all;
  const double bn_eps = PyFloat_AsDouble(arguments[8]), eps = PyFloat_AsDouble(arguments[10]);
  const bool moves = arguments[9] != Py_None;
  const double rate = moves ? PyFloat_AsDouble(arguments[9]) : 0;
  if (PyErr_Occurred()) throw python_error();
  // Python says what is wrong with these.
  if (moves && (!batches.defined() || (mean.is_inference() && !c10::InferenceMode::is_enabled())))
    Py_RETURN_NONE;
  Tensor counted = moves ? batches : Tensor();
  auto type = x.scalar_type();
  if (x.is_cuda() && type != weight.scalar_type() && at::autocast::is_autocast_enabled(at::kCUDA))
    type = weight.scalar_type();  // as autocast's group norm
  const Key key = {0,
                   x.size(0),
                   x.size(1),
                   x.size(2),
                   x.size(3),
                   tensors.layout,
                   weight.numel(),
                   x.device().index(),
                   int(x.scalar_type()) * 1024 + int(type),
                   int(weight.scalar_type()) * 8 + bn_weight.defined() + 2 * bn_bias.defined() +
                       4 * moves,
                   bits(bn_eps),
                   bits(eps)};
  Plan* plan = find(key);
  if (plan == nullptr)
    plan = make(key, Py_BuildValue("sNNNNNNdd", "bcn_forward_plan", wrap(x), wrap(weight),
                                   wrap(bn_weight), wrap(bn_bias), wrap(counted),
                                   Py_NewRef(type == x.scalar_type()
                                                 ? Py_None
                                                 : (PyObject*)torch::getTHPDtype(type)),
                                   bn_eps, eps));
  if (plan == nullptr) Py_RETURN_NONE;
  Tensor y, stats;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    On device(x);
    y = type == x.scalar_type() ? at::empty_like(x) : at::empty_like(x, x.options().dtype(type));
    stats = at::empty({plan->kept, x.size(1)}, weight.options());
    Tensor scratch = at::empty({plan->scratch}, weight.options());
    auto& launches = plan->launches;
    launches[0](device.stream, {&x, &scratch});
    launches[1](device.stream,
                {&scratch, &stats, &weight, &bias, &bn_weight, &bn_bias, &mean, &var, &counted},
                rate);
    launches[2](device.stream, {&x, &y, &scratch, &stats, &counted});
  }
  if (moves && !mean.is_inference())  // autograd has not seen them move
    for (const Tensor* moved : {&mean, &var, &batches}) moved->unsafeGetTensorImpl()->bump_version();
  if (torch::autograd::compute_requires_grad(x, weight, bias, bn_weight, bn_bias)) {
    std::shared_ptr<FusedBCN> node(new FusedBCN(), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias, bn_weight, bn_bias));
    const Tensor* kept[] = {&x, &weight, &bias, &bn_weight, &bn_bias, &stats};
    for (int i = 0; i < 6; i++) node->saved[i] = SavedVariable(*kept[i], false);
    node->eps = eps;
    node->readable = keep(arguments[11]);
    torch::autograd::set_history(y, node);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// takes_bcn(x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count) -> bool
PyObject* takes_bcn(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "takes_bcn takes 8 arguments");
  if (Tensors().take(arguments)) Py_RETURN_TRUE;
  Py_RETURN_FALSE;
  END_HANDLE_TH_ERRORS
}

// --------------------------------------------------------------------------------------------- WS

struct FusedWS : torch::autograd::Node {
  SavedVariable saved;
  std::string formula;
  double eps = 0;
  PyObject* readable = nullptr;
  std::mutex mutex;

  std::string name() const override { return "FusedWS"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex);
    saved.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex);
    Tensor dy = grads[0];
    if (!dy.defined()) return variable_list(1);
    Tensor weight = saved.unpack();
    const bool again = at::GradMode::is_enabled();
    if (!again) {
      Tensor dw = launch(dy, weight, nullptr);
      if (dw.defined()) return {dw};
    }
    WithGIL gil;
    if (!again) {
      Tensor dw = launch(dy, weight, Py_BuildValue("sNsdN", "ws_backward_plan", wrap(weight),
                                                   formula.c_str(), eps, wrap(dy)));
      if (dw.defined()) return {dw};
    }
    Ref arguments(Py_BuildValue("sONNsd", again ? "ws_graph" : "ws_slowly", readable, wrap(dy),
                                wrap(weight), formula.c_str(), eps));
    return unpack_all(PyObject_CallObject(ask, arguments.object));
  }

  Tensor launch(const Tensor& dy, const Tensor& weight, PyObject* arguments);
};

Key ws_key(int64_t pass, const Tensor& weight, std::string_view formula, double eps, at::ScalarType type) {
  return {pass,
          weight.size(0),
          weight.size(1),
          weight.size(2),
          weight.size(3),
          layout_of(weight),
          static_cast<int64_t>(std::hash<std::string_view>{}(formula)),
          weight.device().index(),
          int(weight.scalar_type()),
          int(type),
          bits(eps),
          0};
}

Tensor FusedWS::launch(const Tensor& dy, const Tensor& weight, PyObject* arguments) {
  const Key key = ws_key(3, weight, formula, eps, dy.scalar_type());
  Plan* plan = find(key);
  if (plan == nullptr && arguments != nullptr) plan = make(key, arguments);
  const Layout layout = layout_of(weight);
  if (plan == nullptr || !usual(weight, layout) || !usual(dy, layout)) return Tensor();
  at::AutoDispatchBelowADInplaceOrView guard;
  On device(weight);
  Tensor dw = at::empty_like(weight);
  plan->launches[0](device.stream, {&weight, &dw, &dy});
  return dw;
}

// ws(weight, formula, eps, dtype or None, readable) -> standardized weight
PyObject* ws(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "ws takes 5 arguments");
  Tensor weight;
  if (!unpack(arguments[0], weight) || !weight.defined() || !floating(weight.scalar_type(), true) ||
      weight.numel() == 0 || !usual(weight, layout_of(weight)))
    Py_RETURN_NONE;
  const char* formula = PyUnicode_AsUTF8(arguments[1]);
  const double eps = PyFloat_AsDouble(arguments[2]);
  if (PyErr_Occurred()) throw python_error();
  auto type = weight.scalar_type();
  if (arguments[3] != Py_None) type = reinterpret_cast<THPDtype*>(arguments[3])->scalar_type;
  const Key key = ws_key(2, weight, formula, eps, type);
  Plan* plan = find(key);
  if (plan == nullptr)
    plan = make(key, Py_BuildValue("sNOdO", "ws_forward_plan", wrap(weight), arguments[1], eps,
                                   arguments[3]));
  if (plan == nullptr) Py_RETURN_NONE;
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    On device(weight);
    out = at::empty_like(weight, weight.options().dtype(type));
    plan->launches[0](device.stream, {&weight, &out});
  }
  if (torch::autograd::compute_requires_grad(weight)) {
    std::shared_ptr<FusedWS> node(new FusedWS(), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(weight));
    node->saved = SavedVariable(weight, false);
    node->formula = formula;
    node->eps = eps;
    node->readable = keep(arguments[4]);
    torch::autograd::set_history(out, node);
  }
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

// ---------------------------------------------------------------------------------------- the module

// start(address of the driver's cuLaunchKernel or 0, ask)
PyObject* start(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long address;
  if (!PyArg_ParseTuple(arguments, "KO", &address, &ask)) throw python_error();
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
    {"start", start, METH_VARARGS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "cuda_nodes", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_cuda_nodes() { return PyModule_Create(&module_def); }
