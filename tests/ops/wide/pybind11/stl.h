// see pybind11.h
