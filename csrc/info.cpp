// Introspection module `flashpair._build_info`: what was built, with which compiler, and what this processor offers.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

std::string architecture() {
#if defined(__x86_64__) || defined(_M_X64)
  return "x86-64";
#elif defined(__aarch64__) || defined(_M_ARM64)
  return "aarch64";
#else
  return "unknown";
#endif
}

// Vector instruction sets of the processor that runs this, widest last.
py::list vector_isas() {
  py::list found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  found.append("sse2");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.append("avx2");
  if (__builtin_cpu_supports("avx512f")) found.append("avx512f");
#elif defined(__aarch64__) || defined(_M_ARM64)
  found.append("neon");
#endif
  return found;
}

int vector_bits() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return 512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 256;
#endif
  return 128;
}

// The module that was built along with the CUDA part, or None.
py::object cuda() {
  try {
    return py::module_::import("flashpair._cuda_info");
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    return py::none();
  }
}

py::dict info() {
  py::dict result;
  result["compiler"] = compiler();
  result["cxx_standard"] = static_cast<long>(__cplusplus);
  result["architecture"] = architecture();
  result["torch_built_with"] = FLASHPAIR_TORCH_VERSION;
  result["torch_needed"] = FLASHPAIR_TORCH_TARGET;
  const py::object built = cuda();
  result["cuda"] = !built.is_none();
  result["cuda_version"] = built.is_none() ? py::str() : py::str(built.attr("version"));
  result["cuda_architectures"] = built.is_none() ? py::list() : py::list(built.attr("architectures"));
  result["vector_isas"] = vector_isas();
  result["vector_bits"] = vector_bits();
  return result;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What the native part of flashpair was built from and what this processor offers.";
  m.def("info", &info,
        "Dictionary: compiler, C++ standard, architecture, torch and CUDA versions, vector instruction sets.");
}
