// segops._C: the CPU kernels. Schemas live in Python (segops/*/op.py); this file adds implementations only.
#include "argmax/argmax.h"
#include "bal/bal.h"
#include "pac/pac.h"
#include "pag/pag.h"

#include <pybind11/pybind11.h>

#include <string>

STABLE_TORCH_LIBRARY_IMPL(segops, CPU, m) {
  m.impl("argmax_upsample", TORCH_BOX(&segops::argmax_upsample_cpu));
  m.impl("bal_count_edges", TORCH_BOX(&segops::bal_count_edges_cpu));
  m.impl("bal_blur", TORCH_BOX(&segops::bal_blur_cpu));
  m.impl("bal_softmax_loss", TORCH_BOX(&segops::bal_softmax_loss_cpu));
  m.impl("bal_softmax_grad", TORCH_BOX(&segops::bal_softmax_grad_cpu));
  m.impl("pac_shift_gather", TORCH_BOX(&segops::pac_shift_gather_cpu));
  m.impl("pac_shift_scatter", TORCH_BOX(&segops::pac_shift_scatter_cpu));
  m.impl("pag_pool", TORCH_BOX(&segops::pag_pool_cpu));
  m.impl("pag_scatter", TORCH_BOX(&segops::pag_scatter_cpu));
  m.impl("pag_gather", TORCH_BOX(&segops::pag_gather_cpu));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "segops kernels for the CPU";
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = SEGOPS_COMPILER;
    info["flags"] = SEGOPS_FLAGS;
    return info;
  });
}
