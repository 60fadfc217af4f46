// Adds up partial sums over the rows: the last step of a bias's gradient.
#include <algorithm>
#include <vector>

#include "cpu.h"

namespace varfast {
namespace {

constexpr int64_t kColumns = 512;  // columns of a thread

VARFAST_CLONES void add_row(const float* x, float* sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += x[i];
}
VARFAST_CLONES void add_row(const double* x, double* sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += x[i];
}

}  // namespace

template <typename W>
void column_sums_cpu(const W* x, int64_t rows, int64_t width, W* out) {
  parallel_for((width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, count = std::min(end * kColumns, width) - first;
    // Sum chains of 32 rows, then add the chains. A single chain over all rows would be the main rounding error.
    std::vector<W> chain(count);
    std::fill_n(out + first, count, W(0));
    for (int64_t start = 0; start < rows; start += 32) {
      std::fill(chain.begin(), chain.end(), W(0));
      for (int64_t row = start; row < std::min(start + 32, rows); ++row) {
        add_row(x + row * width + first, chain.data(), count);
      }
      add_row(chain.data(), out + first, count);
    }
  });
}

template void column_sums_cpu(const float*, int64_t, int64_t, float*);
template void column_sums_cpu(const double*, int64_t, int64_t, double*);

}  // namespace varfast
