// Owns: how the steps of a loop backward are cut into windows, and which of them are passes.
// Must not know: cells, tensors, what a loop leaves of a row.
//
// Included once per instruction set, after layer.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// Steps in the order in which forward's loop took them.
struct Steps {
  int64_t begin = 0, end = 0;
};

// The loop leaves the gradients of the gates of a window of steps, which the products over these steps read while the
// cache still has them. Then the next window takes their place: a window is a pass. Where that cannot be, one pass has
// all windows. Sums have one order either way.
class Passes {
 public:
  // row_bytes: what the loop leaves of a row. least_rows: of a window of several steps. windows: whether each is a
  // pass.
  Passes(const Sequence& sequence, int64_t row_bytes, int64_t least_rows, bool windows)
      : s_(sequence), most_(std::max(least_rows, kBytes / row_bytes)), windows_(windows) {}

  // The last window, or pass, of the steps before `end`. As full as can be, there are the fewest there can be, and so
  // as many in each direction.
  Steps window_before(int64_t end, bool reverse) const {
    int64_t begin = end;
    for (int64_t rows = 0; begin > 0; --begin) {
      const int64_t of_step = s_.batch_size(reverse ? s_.steps - begin : begin - 1);
      if (rows > 0 && of_step > 0 && rows + of_step > most_) break;
      rows += of_step;
    }
    return {begin, end};
  }
  Steps pass_before(int64_t end, bool reverse) const { return windows_ ? window_before(end, reverse) : Steps{0, end}; }
  Stretch rows_of(const Steps& steps, bool reverse) const {
    const int64_t first = reverse ? s_.steps - steps.end : steps.begin;
    const int64_t last = first + steps.end - steps.begin;
    const int64_t begin = s_.offset(first), end = last < s_.steps ? s_.offset(last) : s_.rows;
    return {begin, end - begin, steps.end == s_.steps, steps.begin == 0};
  }
  // The most that a pass may have.
  int64_t rows() const { return windows_ ? std::min(s_.rows, std::max(most_, s_.batch)) : s_.rows; }

 private:
  static constexpr int64_t kBytes = 1 << 20;  // of a window: what the cache holds
  const Sequence& s_;
  const int64_t most_;  // rows
  const bool windows_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
