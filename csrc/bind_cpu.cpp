// segops._C: the CPU kernels as a Python module. Schemas live in Python (segops/ops), and
// each kernel's file registers its implementations at its foot.

#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(_C, m) {
  m.doc() = "segops kernels for the CPU";
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = SEGOPS_COMPILER;
    info["flags"] = SEGOPS_FLAGS;
    return info;
  });
}
