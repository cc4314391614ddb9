// How the autograd nodes launch what Triton has compiled, and which tensors they take.
//
// How kernels are launched for a shape (a Plan) is asked of Python once and kept.

#pragma once

#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

using at::Tensor;
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

// Python's error, kept where the thread that has it is one of autograd's, which gives it back.
[[noreturn]] void raise_kept() {
  python_error error;
  error.persist();
  throw std::move(error);
}

struct Ref {  // an owned reference
  PyObject* object;
  explicit Ref(PyObject* object) : object(object) {
    if (object == nullptr) raise_kept();
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
    raise_kept();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(list); i++) {
    Launch launch;
    unsigned long long function;
    PyObject* sizes;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(list, i), "KIIIO!", &function, &launch.programs,
                          &launch.threads, &launch.shared, &PyTuple_Type, &sizes))
      raise_kept();
    launch.function = reinterpret_cast<void*>(function);
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(sizes); k++)
      launch.sizes.push_back(PyLong_AsLong(PyTuple_GET_ITEM(sizes, k)));
    if (PyErr_Occurred()) raise_kept();
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

// A gradient as it must lie, copied if need be; an unusual one is left alone.
Tensor laid_out(const Tensor& dy, Layout layout) {
  if (dy.dim() != 4 || !ordinary(dy) || layout == OTHER || layout_of(dy) == layout) return dy;
  return dy.contiguous(layout == CONTIGUOUS ? at::MemoryFormat::Contiguous
                                            : at::MemoryFormat::ChannelsLast);
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

// A type by its name in Python; None for a tensor's own.
PyObject* type_unless(at::ScalarType type, at::ScalarType own) {
  return Py_NewRef(type == own ? Py_None : reinterpret_cast<PyObject*>(torch::getTHPDtype(type)));
}

template <size_t count>
PyObject* truths(const std::array<bool, count>& values) {
  PyObject* tuple = PyTuple_New(count);
  for (size_t i = 0; tuple != nullptr && i < count; i++)
    PyTuple_SET_ITEM(tuple, i, PyBool_FromLong(values[i]));
  return tuple;
}

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

}  // namespace
