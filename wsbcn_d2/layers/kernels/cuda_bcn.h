// BCN as a node of autograd: autograd.py and triton_bcn.py for the usual case.

#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "cuda_launch.h"

using torch::autograd::SavedVariable;

namespace {

// x, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, bn_count
struct Tensors {
  std::array<Tensor, 8> all;
  Layout layout = OTHER;

  bool take(PyObject* const* objects) {
    for (int i = 0; i < 8; i++)
      if (!unpack(objects[i], all[i])) return false;
    const Tensor &x = all[0], &weight = all[1];
    if (!x.defined() || !weight.defined() || !all[2].defined() || !all[5].defined() ||
        !all[6].defined() || x.dim() != 4 || x.numel() == 0)
      return false;
    layout = layout_of(x);
    const int64_t c = x.size(1), g = weight.numel(), largest = 2147483647;
    const auto type = weight.scalar_type();
    if (!usual(x, layout) || !floating(type, false) ||
        (x.scalar_type() != type && !(floating(x.scalar_type(), true) &&
                                      !floating(x.scalar_type(), false))))
      return false;
    if (g == 0 || c % g || c / g > 2048 || c * x.size(2) * x.size(3) > largest ||
        8 * x.size(0) * c > largest)
      return false;
    for (int i = 1; i < 7; i++)
      if (!fits(all[i], x, type, i < 3 ? g : c)) return false;
    return fits(all[7], x, at::kLong, 1);
  }
};

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
    if (!grads[0].defined()) return variable_list(5);
    std::array<Tensor, 6> t;
    for (int i = 0; i < 6; i++) t[i] = saved[i].unpack();
    const Tensor dy = laid_out(grads[0], layout_of(t[0]));
    std::array<bool, 5> needs;
    for (size_t i = 0; i < 5; i++) needs[i] = task_should_compute_output(i);
    variable_list found = at::GradMode::is_enabled() ? ask_python("bcn_graph", dy, t, needs)
                                                     : launch(dy, t, needs);
    for (int i = 0; i < 5; i++)
      if (!needs[i]) found[i].reset();
    return found;
  }

  variable_list ask_python(const char* what, const Tensor& dy, const std::array<Tensor, 6>& t,
                           const std::array<bool, 5>& needs) const {
    WithGIL gil;
    Ref arguments(Py_BuildValue("sONNNNNNNdN", what, readable, wrap(dy), wrap(t[0]), wrap(t[1]),
                                wrap(t[2]), wrap(t[3]), wrap(t[4]), wrap(t[5]), eps,
                                truths(needs)));
    return unpack_all(PyObject_CallObject(ask, arguments.object));
  }

  // The five gradients, as far as one is needed or costs nothing. Without the GIL.
  variable_list launch(const Tensor& dy, const std::array<Tensor, 6>& t,
                       const std::array<bool, 5>& needs) const {
    const auto &[x, weight, bias, bn_weight, bn_bias, stats] = t;
    const Layout layout = layout_of(x);
    const bool bn = needs[3] || needs[4];
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
    if (plan == nullptr) {
      WithGIL gil;
      plan = make(key, Py_BuildValue("sNNNNNN", "bcn_backward_plan", wrap(x), wrap(weight),
                                     wrap(bn_weight), wrap(bn_bias), wrap(dy), PyBool_FromLong(bn)));
    }
    if (plan == nullptr || !usual(x, layout) || !usual(dy, layout))
      return ask_python("bcn_slowly", dy, t, needs);
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
    if (needs[0]) {
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
  if (PyErr_Occurred()) raise_kept();
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
                                   type_unless(type, x.scalar_type()), bn_eps, eps));
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

}  // namespace
