// Autograd nodes for the kernels that Triton has compiled: what triton_bcn.py, triton_ws.py and
// autograd.py do at each call, at a tenth of the host time. Built by cuda_nodes.py.
//
// Only the usual case is done here. A function returns None for everything else: other types of
// tensors, memory laid out in another way, launches that Triton has not compiled yet. Python's way
// then serves. How kernels are launched for a shape is asked of Python once and kept.

#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

// ------------------------------------------------------------------------------------ launching

using Driver = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       void*, void**, void**);
Driver driver = nullptr;  // cuLaunchKernel

// A compiled kernel at one size.
struct Launch {
  void* function;  // null launches nothing, which times the host
  unsigned programs, threads, shared;
  std::vector<int32_t> sizes;

  // Absent tensors are no arguments of what Triton compiles.
  void operator()(void* stream, std::initializer_list<const Tensor*> tensors,
                  std::optional<double> rate = std::nullopt) {
    void *pointers[16], *arguments[32], *none = nullptr;
    int count = 0, many = 0;
    for (const Tensor* tensor : tensors)
      if (tensor->defined()) {
        pointers[count] = tensor->data_ptr();
        arguments[many++] = &pointers[count++];
      }
    if (rate) arguments[many++] = &*rate;
    for (int32_t& size : sizes) arguments[many++] = &size;
    // Triton's own two, memory for the whole grid and for profiling, neither of which is used.
    arguments[many++] = &none;
    arguments[many++] = &none;
    if (function == nullptr) return;
    int error = driver(function, programs, 1, 1, threads, 1, 1, shared, stream, arguments, nullptr);
    TORCH_CHECK(error == 0, "launching a kernel of wsbcn_d2 failed: CUDA driver error ", error);
  }
};

// All of one pass: the launches, and how much memory they need between and after them.
struct Plan {
  int64_t kept, scratch;
  std::vector<Launch> launches;
};

using Key = std::array<int64_t, 12>;

struct Hash {
  size_t operator()(const Key& key) const {
    size_t hash = 1469598103934665603u;
    for (int64_t value : key) hash = (hash ^ value) * 1099511628211u ^ (hash >> 29);
    return hash;
  }
};

std::mutex plans_mutex;  // backward passes run in threads of their own
std::unordered_map<Key, Plan, Hash> plans;

// Python's ask(what, ...): for a plan, or to do something in its own way.
PyObject* ask = nullptr;

// Readable forms, which nodes may outlive in nobody's hands: few, and kept for good.
std::unordered_set<PyObject*> readable_forms;

PyObject* keep(PyObject* readable) {
  if (readable_forms.insert(readable).second) Py_INCREF(readable);
  return readable;
}

struct Ref {  // an owned reference
  PyObject* object;
  explicit Ref(PyObject* object) : object(object) {
    if (object == nullptr) throw python_error();
  }
  ~Ref() { Py_DECREF(object); }
  Ref(const Ref&) = delete;
};

struct WithGIL {
  PyGILState_STATE state = PyGILState_Ensure();
  ~WithGIL() { PyGILState_Release(state); }
};

Plan* find(const Key& key) {
  std::lock_guard<std::mutex> lock(plans_mutex);
  auto found = plans.find(key);
  return found == plans.end() ? nullptr : &found->second;  // which stays where it is
}

// The plan for a key from Python's (kept, scratch, ((function, programs, threads, shared, sizes),
// ...)); null for its None: Triton has yet to compile. Takes the reference; with the GIL.
Plan* make(const Key& key, PyObject* arguments) {
  Ref owned(arguments), made(PyObject_CallObject(ask, arguments));
  if (made.object == Py_None) return nullptr;
  Plan plan;
  PyObject* list;
  if (!PyArg_ParseTuple(made.object, "LLO!", &plan.kept, &plan.scratch, &PyTuple_Type, &list))
    throw python_error();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(list); i++) {
    Launch launch;
    unsigned long long function;
    PyObject* sizes;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(list, i), "KIIIO!", &function, &launch.programs,
                          &launch.threads, &launch.shared, &PyTuple_Type, &sizes))
      throw python_error();
    launch.function = reinterpret_cast<void*>(function);
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(sizes); k++)
      launch.sizes.push_back(PyLong_AsLong(PyTuple_GET_ITEM(sizes, k)));
    if (PyErr_Occurred()) throw python_error();
    plan.launches.push_back(std::move(launch));
  }
  std::lock_guard<std::mutex> lock(plans_mutex);
  return &plans.emplace(key, std::move(plan)).first->second;
}

// The device of a tensor as the current one, and its stream, as long as this lives.
struct On {
  c10::OptionalDeviceGuard guard;
  void* stream = nullptr;
  explicit On(const Tensor& x) {
    if (!x.is_cuda()) return;  // nothing is launched
    guard.reset_device(x.device());
    c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    stream = impl.getStream(x.device()).native_handle();
  }
};

// ---------------------------------------------------------------------------- the usual case

enum Layout { CONTIGUOUS, CHANNELS_LAST, OTHER };

Layout layout_of(const Tensor& x) {
  if (x.is_contiguous()) return CONTIGUOUS;
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? CHANNELS_LAST : OTHER;
}

bool ordinary(const Tensor& x) {
  return x.layout() == at::kStrided && !x.is_neg() && !x._is_zerotensor() &&
         !x.unsafeGetTensorImpl()->is_python_dispatch();
}

// Whether an activation, weight or gradient can be read as it lies.
bool usual(const Tensor& x, Layout layout) {
  return x.dim() == 4 && ordinary(x) && layout_of(x) == layout && layout != OTHER &&
         (reinterpret_cast<uintptr_t>(x.data_ptr()) & 15) == 0;
}

bool floating(at::ScalarType type, bool half) {
  return type == at::kFloat || type == at::kDouble ||
         (half && (type == at::kHalf || type == at::kBFloat16));
}

bool fits(const Tensor& t, const Tensor& x, at::ScalarType type, int64_t numel) {
  return !t.defined() || (t.scalar_type() == type && t.numel() == numel && ordinary(t) &&
                          t.device() == x.device() && t.is_contiguous());
}

// A tensor of exactly that type, or an absent one; false for anything else.
bool unpack(PyObject* object, Tensor& tensor) {
  if (object == Py_None) return true;
  if (!THPVariable_Check(object) || !THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

int64_t bits(double value) {
  int64_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

PyObject* wrap(const Tensor& tensor) {
  if (tensor.defined()) return THPVariable_Wrap(tensor);
  Py_RETURN_NONE;
}

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
