// ExecuTorch's Module behind a C interface: what a ctypes caller needs to run methods on arrays of its own.
//
// Every function returns 0, or writes one line of text and returns 1.

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

// The wheel ships this library without its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
  size_t get_thread_count() const;
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

thread_local std::string last_message;

void keep_message(
    et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message, size_t length) {
  if (level >= kError) {
    last_message.assign(message, length);
  }
}

int fail(const std::string& what, Error error, char* text, size_t size) {
  std::string line = what + ": " + executorch::runtime::to_string(error);
  if (!last_message.empty()) {
    line += " (" + last_message + ")";
  }
  std::snprintf(text, size, "%s", line.c_str());
  last_message.clear();
  return 1;
}

std::mutex opening;
size_t open_programs = 0;

struct Program {
  Module module;
  // Arenas are not shared: a program is opened for one method, and would hold what the largest of all takes.
  explicit Program(const char* path) : module(path, Module::LoadMode::Mmap) {}
};

// Programs that are open hold on to the thread pool: another one would be used after it is gone.
bool use_threads(uint32_t threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (threads == 0 || pool == nullptr || pool->get_thread_count() == threads) {
    return true;
  }
  return open_programs == 0 && pool->_unsafe_reset_threadpool(threads);
}

void initialise() {
  static std::once_flag once;
  std::call_once(once, [] {
    executorch::runtime::runtime_init();
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(keep_message, __FILE__));
  });
}

// What is thrown must not reach a caller that is no C++.
template <typename Function>
int guarded(char* text, size_t size, Function function) {
  last_message.clear();
  try {
    return function();
  } catch (const std::exception& error) {
    std::snprintf(text, size, "%s", error.what());
  } catch (...) {
    std::snprintf(text, size, "an unknown exception");
  }
  return 1;
}

bool describe(const executorch::runtime::TensorInfo& info, int32_t* out) {
  const auto sizes = info.sizes();
  if (sizes.size() > 8) {
    return false;
  }
  out[0] = static_cast<int32_t>(info.scalar_type());
  out[1] = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    out[2 + i] = sizes[i];
  }
  return true;
}

}  // namespace

extern "C" {

// Threads: 0 keeps ExecuTorch's own choice.
int pyrexport_open(const char* path, uint32_t threads, void** program, char* text, size_t size) {
  return guarded(text, size, [&] {
    const std::lock_guard<std::mutex> lock(opening);
    initialise();
    executorch::runtime::BackendOptions<2> options;
    (void)options.set_option("weight_cache_enabled", true);
    (void)options.set_option("workspace_sharing_mode", 2);  // one for all delegates, of which a method has many
    Error error = executorch::runtime::set_option("XnnpackBackend", options.view());
    if (error != Error::Ok) {
      return fail("XNNPACK", error, text, size);
    }
    if (!use_threads(threads)) {
      std::snprintf(
          text, size, "programs that are open use %zu threads: close them before others are opened with %u",
          executorch::extension::threadpool::get_threadpool()->get_thread_count(), threads);
      return 1;
    }
    auto opened = std::make_unique<Program>(path);
    error = opened->module.load(executorch::runtime::Program::Verification::InternalConsistency);
    if (error != Error::Ok) {
      return fail("not a program of this version", error, text, size);
    }
    ++open_programs;
    *program = opened.release();
    return 0;
  });
}

void pyrexport_close(void* program) {
  const std::lock_guard<std::mutex> lock(opening);
  delete static_cast<Program*>(program);
  --open_programs;
}

// Loads a method. `specs` receives 10 numbers per input, then per output: dtype, rank, sizes.
int pyrexport_load(
    void* program, const char* method, int32_t* specs, size_t capacity, size_t* counts, char* text, size_t size) {
  return guarded(text, size, [&] {
    const std::lock_guard<std::mutex> lock(opening);
    Module& module = static_cast<Program*>(program)->module;
    auto names = module.method_names();
    if (!names.ok() || names->count(method) == 0) {
      std::snprintf(text, size, "it has no method %s", method);
      return 1;
    }
    const Error error = module.load_method(method);
    if (error != Error::Ok) {
      return fail(std::string("method ") + method, error, text, size);
    }
    auto meta = module.method_meta(method);
    if (!meta.ok()) {
      return fail(method, meta.error(), text, size);
    }
    counts[0] = meta->num_inputs();
    counts[1] = meta->num_outputs();
    if (counts[0] + counts[1] > capacity) {
      return fail("too many inputs and outputs", Error::InvalidProgram, text, size);
    }
    for (size_t i = 0; i < counts[0] + counts[1]; ++i) {
      auto info = i < counts[0] ? meta->input_tensor_meta(i) : meta->output_tensor_meta(i - counts[0]);
      if (!info.ok() || !describe(*info, specs + 10 * i)) {
        return fail("an input or output is no tensor", Error::InvalidProgram, text, size);
      }
    }
    return 0;
  });
}

// Runs a loaded method on buffers of the sizes that `pyrexport_load` told; one call at a time for a program.
int pyrexport_run(
    void* program, const char* method, const int32_t* specs, const size_t* counts, void* const* inputs,
    void* const* outputs, char* text, size_t size) {
  return guarded(text, size, [&] {
    Module& module = static_cast<Program*>(program)->module;
    std::vector<executorch::extension::TensorPtr> tensors;
    std::vector<EValue> values;
    for (size_t i = 0; i < counts[0]; ++i) {
      const int32_t* spec = specs + 10 * i;
      std::vector<SizesType> sizes(spec + 2, spec + 2 + spec[1]);
      tensors.push_back(
          executorch::extension::make_tensor_ptr(std::move(sizes), inputs[i], static_cast<ScalarType>(spec[0])));
      values.emplace_back(tensors.back());
    }
    auto results = module.execute(method, values);
    if (!results.ok()) {
      return fail(method, results.error(), text, size);
    }
    if (results->size() != counts[1]) {
      return fail("number of outputs", Error::InvalidProgram, text, size);
    }
    for (size_t i = 0; i < counts[1]; ++i) {
      const auto& tensor = (*results)[i].toTensor();
      std::memcpy(outputs[i], tensor.const_data_ptr(), tensor.nbytes());
    }
    return 0;
  });
}

}  // extern "C"
