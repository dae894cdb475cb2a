// segops._C_cuda: the CUDA kernels as a Python module. Schemas live in Python (segops/ops), and
// each kernel's file registers its implementations at its foot.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "segops kernels for CUDA";
  m.def("build_info", [] {
    std::vector<std::string> architectures;
    std::istringstream list(SEGOPS_ARCHITECTURES);
    for (std::string name; list >> name;) architectures.push_back(name);
    pybind11::dict info;
    info["compiler"] = SEGOPS_COMPILER;
    info["flags"] = SEGOPS_FLAGS;
    info["architectures"] = architectures;
    return info;
  });
}
