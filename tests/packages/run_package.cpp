// run_package LIBRARY PACKAGE CLASSES: what a C++ program does to run an AOTInductor package that calls ops of segops. The
// class maps of two images go to the last file.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <iostream>

int main(int, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const at::Tensor images = at::arange(2 * 3 * 96 * 128, at::kFloat).sin().mul(5).view({2, 3, 96, 128});
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const at::Tensor classes = model.run({images})[0].contiguous();
  std::FILE* file = std::fopen(arguments[3], "wb");
  const auto count = size_t(classes.numel());
  const bool whole = std::fwrite(classes.const_data_ptr<int64_t>(), sizeof(int64_t), count, file) == count;
  return std::fclose(file) || !whole;
}
