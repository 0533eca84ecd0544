// The CUDA module: an empty Python module whose loading registers the CUDA kernels.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/build_facts.h"

namespace {

// Lines of name=value.
std::string cuda_build_facts() {
  return "toolkit=" + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10) + "\narchs=" + chanprune::compiled_archs();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(chanprune, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_facts", TORCH_BOX(&cuda_build_facts));
}

extern "C" {

// Imported as chanprune_ext._C_cuda, after chanprune_ext._C has defined the operators.
__attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
}
