// The CPU module: an empty Python module whose loading registers the operators, and every schema.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(chanprune, m) {
  m.def("channel_norms(Tensor[] weights, int[] dims, float p) -> Tensor[]");
  m.def("slice_channels(Tensor[] tensors, Tensor?[] rows, Tensor?[] cols) -> Tensor[]");
  m.def("kd_kl_div(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_weights, "
        "float temperature, float soft_weight, float hard_weight, float label_smoothing, "
        "int ignore_index, int reduction) -> (Tensor loss, Tensor statistics)");
  m.def("kd_kl_div_with_gradient(Tensor student, Tensor teacher, Tensor? labels, "
        "Tensor? row_weights, float temperature, float soft_weight, float hard_weight, "
        "float label_smoothing, int ignore_index, int reduction) -> (Tensor loss, Tensor gradient)");
  m.def("kd_kl_div_backward(Tensor grad, Tensor student, Tensor teacher, Tensor statistics, "
        "Tensor? labels, Tensor? row_weights, float temperature, float soft_weight, "
        "float hard_weight, float label_smoothing, int ignore_index, int reduction) -> Tensor");
  m.def("simd_level() -> str");
  m.def("build_facts() -> str");
  m.def("cuda_build_facts() -> str");
}
// clang-format on

extern "C" {

// Imported as chanprune_ext._C; all content is in the static registrations of this library.
__attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
}
