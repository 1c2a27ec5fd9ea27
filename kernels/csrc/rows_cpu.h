#pragma once

#include "row_pass.h"

// Compute one row on one thread: rows_cpu.cpp, compiled for each instruction set.
void row_portable(const DertaRows &rows, int64_t i_row);
void row_avx2(const DertaRows &rows, int64_t i_row);
void row_avx512(const DertaRows &rows, int64_t i_row);
