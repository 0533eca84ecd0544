#pragma once

namespace chanprune {

// Architectures the kernels were compiled for, e.g. "800,900".
const char* compiled_archs();

}  // namespace chanprune
