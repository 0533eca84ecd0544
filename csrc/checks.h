// Argument checks shared by all operators. Every message says argument, expectation and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace chanprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
  }
}

inline bool is_supported_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// Half types are accumulated and returned in float32, float64 stays float64.
inline ScalarType accumulation_dtype(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace chanprune

#define CHANPRUNE_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

#define CHANPRUNE_CHECK_FLOAT_TYPE(type, name)                              \
  STD_TORCH_CHECK(::chanprune::is_supported_float(type), name,              \
                  " should be float16, bfloat16, float32 or float64, got ", \
                  ::chanprune::dtype_name(type))
