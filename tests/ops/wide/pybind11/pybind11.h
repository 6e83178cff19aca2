// What bindings/arguments.h needs of pybind11, where no Python is.
#include <cstdint>
#include <string>
#include <vector>
