// segops._C: the CPU kernels. Schemas live in Python (segops/*/op.py), implementations at the foot of each kernel's file; this
// one makes a Python module of them.

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
