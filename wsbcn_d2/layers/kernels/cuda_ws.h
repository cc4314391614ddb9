// WS as nodes of autograd: a weight, and a convolution with its weight in one.

#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "cuda_launch.h"

using torch::autograd::SavedVariable;

namespace {

Key ws_key(int64_t pass, const Tensor& weight, std::string_view formula, double eps,
           at::ScalarType type) {
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

// What a weight is standardized by.
struct How {
  std::string formula;
  double eps = 0;
  PyObject* readable = nullptr;

  // The standardized weight in a type; undefined if Python's way must serve. With the GIL.
  Tensor forward(const Tensor& weight, at::ScalarType type) const {
    if (weight.numel() == 0 || !floating(weight.scalar_type(), true) ||
        !usual(weight, layout_of(weight)))
      return Tensor();
    const Key key = ws_key(2, weight, formula, eps, type);
    Plan* plan = find(key);
    if (plan == nullptr)
      plan = make(key, Py_BuildValue("sNsdN", "ws_forward_plan", wrap(weight), formula.c_str(), eps,
                                     type_unless(type, weight.scalar_type())));
    if (plan == nullptr) return Tensor();
    at::AutoDispatchBelowADInplaceOrView guard;
    On device(weight);
    Tensor out = at::empty_like(weight, weight.options().dtype(type));
    plan->launches[0](device.stream, {&weight, &out});
    return out;
  }

  // The gradient of the weight from that of the standardized one. Without the GIL.
  Tensor backward(const Tensor& found, const Tensor& weight) const {
    const Layout layout = layout_of(weight);
    const Tensor dy = laid_out(found, layout);
    const Key key = ws_key(3, weight, formula, eps, dy.scalar_type());
    Plan* plan = find(key);
    if (plan == nullptr) {
      WithGIL gil;
      plan = make(key, Py_BuildValue("sNsdN", "ws_backward_plan", wrap(weight), formula.c_str(),
                                     eps, wrap(dy)));
    }
    if (plan == nullptr || !usual(weight, layout) || !usual(dy, layout))
      return ask_python("ws_slowly", dy, weight);
    at::AutoDispatchBelowADInplaceOrView guard;
    On device(weight);
    Tensor dw = at::empty_like(weight);
    plan->launches[0](device.stream, {&weight, &dw, &dy});
    return dw;
  }

  Tensor ask_python(const char* what, const Tensor& dy, const Tensor& weight) const {
    WithGIL gil;
    Ref arguments(
        Py_BuildValue("sONNsd", what, readable, wrap(dy), wrap(weight), formula.c_str(), eps));
    return unpack_all(PyObject_CallObject(ask, arguments.object))[0];
  }
};

struct FusedWS : torch::autograd::Node {
  SavedVariable saved;
  How how;
  std::mutex mutex;

  std::string name() const override { return "FusedWS"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex);
    saved.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex);
    if (!grads[0].defined()) return variable_list(1);
    const Tensor weight = saved.unpack();
    if (at::GradMode::is_enabled()) return {how.ask_python("ws_graph", grads[0], weight)};
    return {how.backward(grads[0], weight)};
  }
};

// ws(weight, formula, eps, dtype or None, readable) -> standardized weight
PyObject* ws(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "ws takes 5 arguments");
  Tensor weight;
  if (!unpack(arguments[0], weight) || !weight.defined()) Py_RETURN_NONE;
  const How how{PyUnicode_AsUTF8(arguments[1]), PyFloat_AsDouble(arguments[2]), keep(arguments[4])};
  auto type = weight.scalar_type();
  if (arguments[3] != Py_None) type = reinterpret_cast<THPDtype*>(arguments[3])->scalar_type;
  Tensor out = how.forward(weight, type);
  if (!out.defined()) Py_RETURN_NONE;
  if (torch::autograd::compute_requires_grad(weight)) {
    std::shared_ptr<FusedWS> node(new FusedWS(), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(weight));
    node->saved = SavedVariable(weight, false);
    node->how = how;
    torch::autograd::set_history(out, node);
  }
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

// --------------------------------------------------------------------------------- WS convolution

using Pair = std::array<int64_t, 2>;

// A convolution on a standardized weight as one node: two would cost the host half as much again.
struct FusedWSConv : torch::autograd::Node {
  SavedVariable raw, x, weight;  // in the order of two nodes: checkpointing counts them
  How how;
  Pair stride{}, padding{}, dilation{};
  int64_t groups = 1;
  c10::OptionalArray<int64_t> bias;  // its size
  std::mutex mutex;

  std::string name() const override { return "FusedWSConv"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex);
    for (SavedVariable* variable : {&raw, &x, &weight}) variable->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return variable_list(3);
    const Tensor w = raw.unpack(), input = x.unpack(), standardized = weight.unpack();
    std::array<bool, 3> needs;
    for (size_t i = 0; i < 3; i++) needs[i] = task_should_compute_output(i);
    if (at::GradMode::is_enabled()) return graph(dy, w, input, needs);
    Tensor dx, dw, db;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      // The weight's values are read for dx alone, and kept only where that was needed.
      const Tensor& values = standardized.defined() ? standardized : w;
      std::tie(dx, dw, db) = at::convolution_backward(
          dy, input, values.scalar_type() == dy.scalar_type() ? values : values.to(dy.scalar_type()),
          bias, stride, padding, dilation, false, Pair{0, 0}, groups, needs);
    }
    return {dx, needs[1] ? how.backward(dw, w) : dw, db};
  }

  variable_list graph(const Tensor& dy, const Tensor& w, const Tensor& input,
                      const std::array<bool, 3>& needs) const {
    WithGIL gil;
    Ref arguments(Py_BuildValue(
        "sONNNsd(LL)(LL)(LL)LN", "ws_conv_graph", how.readable, wrap(dy), wrap(input), wrap(w),
        how.formula.c_str(), how.eps, stride[0], stride[1], padding[0], padding[1], dilation[0],
        dilation[1], groups, truths(needs)));
    return unpack_all(PyObject_CallObject(ask, arguments.object));
  }
};

bool pair(PyObject* object, Pair& values) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) return false;
  for (int i = 0; i < 2; i++) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(object, i));
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

// ws_conv(x, weight, bias, stride, padding, dilation, groups, formula, eps, readable) -> y
PyObject* ws_conv(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 10, "ws_conv takes 10 arguments");
  Tensor x, weight, bias;
  Pair stride, padding, dilation;
  if (!unpack(arguments[0], x) || !unpack(arguments[1], weight) || !unpack(arguments[2], bias) ||
      !x.defined() || !weight.defined() || x.dim() != 4 || x.numel() == 0 || !ordinary(x) ||
      x.device() != weight.device() || !pair(arguments[3], stride) ||
      !pair(arguments[4], padding) || !pair(arguments[5], dilation))
    Py_RETURN_NONE;
  const bool recorded = at::GradMode::is_enabled();
  // A plain convolution keeps nothing of its input where the weight is constant.
  if (recorded && !weight.requires_grad()) Py_RETURN_NONE;
  const auto kind = x.device().type();
  auto type = weight.scalar_type();
  if ((x.is_cuda() || x.is_cpu()) && at::autocast::is_autocast_enabled(kind)) {
    // As autocast does, but for the weight, which is written in that type at once.
    if (type != at::kFloat || !floating(x.scalar_type(), true) || x.scalar_type() == at::kDouble)
      Py_RETURN_NONE;
    type = at::autocast::get_autocast_dtype(kind);
    x = at::autocast::cached_cast(type, x, kind);
    if (bias.defined()) bias = at::autocast::cached_cast(type, bias, kind);
  }
  if (x.scalar_type() != type || (bias.defined() && bias.scalar_type() != type)) Py_RETURN_NONE;
  const How how{PyUnicode_AsUTF8(arguments[7]), PyFloat_AsDouble(arguments[8]), keep(arguments[9])};
  const int64_t groups = PyLong_AsLongLong(arguments[6]);
  if (PyErr_Occurred()) raise_kept();
  Tensor standardized = how.forward(weight, type);
  if (!standardized.defined()) Py_RETURN_NONE;
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    y = at::convolution(x, standardized, bias, stride, padding, dilation, false, Pair{0, 0}, groups);
  }
  if (recorded) {
    std::shared_ptr<FusedWSConv> node(new FusedWSConv(), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
    node->raw = SavedVariable(weight, false);
    node->x = SavedVariable(x, false);
    if (x.requires_grad()) node->weight = SavedVariable(standardized, false);
    node->how = how;
    node->stride = stride;
    node->padding = padding;
    node->dilation = dilation;
    node->groups = groups;
    if (bias.defined()) node->bias = c10::OptionalArray<int64_t>({bias.size(0)});
    torch::autograd::set_history(y, node);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

}  // namespace
