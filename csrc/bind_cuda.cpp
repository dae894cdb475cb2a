// segops._C_cuda: the CUDA kernels. Schemas live in Python (segops/*/op.py); this file adds implementations only.
#include "argmax/argmax.h"
#include "bal/bal.h"
#include "pac/pac.h"
#include "pag/pag.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

STABLE_TORCH_LIBRARY_IMPL(segops, CUDA, m) {
  m.impl("argmax_upsample", TORCH_BOX(&segops::argmax_upsample_cuda));
  m.impl("bal_count_edges", TORCH_BOX(&segops::bal_count_edges_cuda));
  m.impl("bal_blur", TORCH_BOX(&segops::bal_blur_cuda));
  m.impl("bal_softmax_loss", TORCH_BOX(&segops::bal_softmax_loss_cuda));
  m.impl("bal_softmax_grad", TORCH_BOX(&segops::bal_softmax_grad_cuda));
  m.impl("pac_shift_gather", TORCH_BOX(&segops::pac_shift_gather_cuda));
  m.impl("pac_shift_scatter", TORCH_BOX(&segops::pac_shift_scatter_cuda));
  m.impl("pag_pool", TORCH_BOX(&segops::pag_pool_cuda));
  m.impl("pag_scatter", TORCH_BOX(&segops::pag_scatter_cuda));
  m.impl("pag_gather", TORCH_BOX(&segops::pag_gather_cuda));
}

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
