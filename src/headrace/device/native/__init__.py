"""The whole step in native code: `layout.h` states the layout of every array, `step.cpp` the order of the phases."""
