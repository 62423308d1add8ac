// Module `flashpair._cuda_info`: what the CUDA part was built from. Built along with it, so that the two agree.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_cuda_info, m) {
  m.doc() = "What the CUDA part of flashpair was built from; `flashpair._build_info.info()` reports it.";
  m.attr("version") = FLASHPAIR_CUDA_VERSION;
  py::list architectures;  // such as "80" or, with PTX for newer ones, "90+PTX"
  std::istringstream text(FLASHPAIR_CUDA_ARCHS);
  for (std::string one; std::getline(text, one, ',');) architectures.append(one);
  m.attr("architectures") = architectures;
}
