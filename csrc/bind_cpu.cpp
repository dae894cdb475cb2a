// segops._C: tells Python how libsegops_cpu was built. Each op's file registers it at its foot.

#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(_C, m) {
  m.doc() = "How segops/libsegops_cpu.so was built";
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = SEGOPS_COMPILER;
    info["flags"] = SEGOPS_FLAGS;
    return info;
  });
}
