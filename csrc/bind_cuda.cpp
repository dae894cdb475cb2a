// segops._C_cuda: tells Python how libsegops_cuda was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "How segops/libsegops_cuda.so was built";
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
