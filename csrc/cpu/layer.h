// Owns: what forward and backward share: where rows lie, who does which part, how a workspace is carved.
// Must not know: equations, tensors.
//
// Included once per instruction set, after product.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// Hands out 64-byte aligned pieces of a workspace. With a null base it only counts, so that one function both sizes a
// workspace and lays it out.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    // One vector of slack: whole-vector loads may run past the end of the last row.
    const size_t bytes = round_up(count * sizeof(T) + RNNFAST_VECTOR_BYTES, 64);
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += bytes;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// What one thread sees of a workspace that has pieces for each direction and for each thread.
template <class Workspace>
struct Carved {
  typename Workspace::Shared shared[2];
  typename Workspace::Own own;

  Carved(const Workspace& sizes, Carver& carver, int rank) {
    for (int d = 0; d < sizes.layer.directions; ++d) shared[d] = sizes.carve_shared(sizes.layer.direction[d], carver);
    for (int r = 0; r < sizes.threads; ++r) {
      const auto of_thread = sizes.carve_own(carver);
      if (r == rank) own = of_thread;
    }
  }
};
template <class Workspace>
size_t bytes_of(const Workspace& sizes) {
  Carver carver(nullptr);
  Carved<Workspace>(sizes, carver, 0);
  return carver.used();
}
// f(pieces, rank, size) on up to `threads` threads.
template <class Workspace, class F>
void run_carved(const Workspace& sizes, void* workspace, int threads, const F& f) {
  run_team(threads, [&](int rank, int size) {
    FlushDenormals flush;
    Carver carver(workspace);
    f(Carved<Workspace>(sizes, carver, rank), rank, size);
  });
}

// How a team divides the work of one direction.
enum class Divide {
  rows,   // each thread its own rows of the batch, all steps, no barrier
  units,  // each thread its own hidden units of every row, one barrier a step
};

struct Plan {
  int threads = 1;  // in all
  Divide divide = Divide::rows;
};

// Cycles of one step of one row, roughly: a multiply-add per lane and cycle, and the nonlinearities.
inline double row_cycles(int gates, int64_t inputs, int64_t hidden, int64_t outputs) {
  return double(gates) * hidden * (inputs + outputs) / 16 + 2.5 * gates * hidden + 60;
}

// whole_rows: units must not be divided.
inline Plan make_plan(int gates, int64_t inputs, int64_t hidden, int64_t outputs, int directions,
                      const Sequence& sequence, size_t element, bool whole_rows, int max_threads) {
  Plan plan;
  const double row = row_cycles(gates, inputs, hidden, outputs);
  // Waking a team costs some microseconds; below this there is nothing to win.
  if (max_threads <= 1 || row * sequence.rows * directions < 1e5) return plan;
  const int each = max_threads / directions;  // threads a direction
  if (each <= 1) {
    plan.threads = directions == 2 ? 2 : 1;
    return plan;
  }
  if (whole_rows) {
    plan.threads = int(std::min<int64_t>(each, sequence.batch)) * directions;
    return plan;
  }
  const double bytes = double(gates) * hidden * outputs * element;
  const double second_level_cache = 768 << 10;
  if (sequence.batch >= each && (bytes <= second_level_cache || sequence.batch >= 32 * each)) {
    plan.threads = each * directions;
  } else if (row * sequence.batch / each > 6000) {  // a barrier is worth about a tenth of this
    plan.threads = each * directions;
    plan.divide = Divide::units;
  } else {
    plan.threads = directions;
  }
  return plan;
}

// One thread's place in the team of one direction.
struct Member {
  int rank = 0, size = 1;
  Divide divide = Divide::rows;
  Barrier* barrier = nullptr;

  void wait() const { barrier->wait(size); }
  // Between steps: with rows divided, nobody reads what another thread writes.
  void wait_step() const {
    if (divide == Divide::units) wait();
  }
};

// Splits a team over the directions: f(direction, member) for each direction this thread takes part in.
template <class F>
void for_directions(int directions, int rank, int size, Divide divide, Barrier* barriers, const F& f) {
  if (directions == 1 || size == 1) {
    for (int d = 0; d < directions; ++d) f(d, Member{rank, size, divide, &barriers[d]});
    return;
  }
  const int first = (size + 1) / 2;
  if (rank < first) {
    f(0, Member{rank, first, divide, &barriers[0]});
  } else {
    f(1, Member{rank - first, size - first, divide, &barriers[1]});
  }
}

// The slots of the batch that are a thread's; with sequences of different length, by equal work.
inline Share row_share(const Sequence& s, const Member& m) {
  Share share(s.batch, m.rank, m.size);
  if (m.divide == Divide::units) return Share(s.batch, 0, 1);
  if (!s.batch_sizes || m.size == 1) return share;
  auto boundary = [&](int part) {
    if (part == 0) return int64_t(0);
    if (part == m.size) return s.batch;
    int64_t low = 0, high = s.batch;  // the least slot with `part / size` of all rows before it
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t before = 0;
      for (int64_t t = 0; t < s.steps; ++t) before += std::min(s.batch_sizes[t], middle);
      if (before * m.size < s.rows * part) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  share.begin = boundary(m.rank);
  share.end = boundary(m.rank + 1);
  return share;
}

// Room for rows of the batch: of the threads of a direction each has its own, for its slots and `spare` rows more.
struct RowRoom {
  bool divided;  // the slots; else each thread has room for all of them
  int64_t batch, spare;

  int64_t rows(int threads) const { return (divided ? 1 : threads) * batch + threads * spare; }
  // Where a thread's begin.
  int64_t first(const Member& m, const Share& slots) const {
    return (divided ? slots.begin : m.rank * batch) + m.rank * spare;
  }
};

inline Share block_share(int64_t blocks, const Member& m) {
  return m.divide == Divide::units ? Share(blocks, m.rank, m.size) : Share(blocks, 0, 1);
}

// Whether the state is dropped between step t and the step that follows it in the direction of the layer. `next` must
// be a living step of the slot.
inline bool boundary_after(const Sequence& s, int64_t t, int64_t slot, bool reverse) {
  if (!s.reset) return false;
  const int64_t at = reverse ? t : t + 1;  // the later of the two steps carries the flag
  return s.reset[s.tensor_row(at, slot)];
}
// Whether `slot` has a step after t in the direction of the layer.
inline bool has_next(const Sequence& s, int64_t t, int64_t slot, bool reverse) {
  return reverse ? t > 0 : t + 1 < s.steps && slot < s.batch_size(t + 1);
}
// Whether `slot` has a step before t in the direction of the layer.
inline bool has_previous(const Sequence& s, int64_t t, int64_t slot, bool reverse) {
  return has_next(s, t, slot, !reverse);
}
// Whether step t starts from zero: a boundary lies before it. The first step of a forward direction may carry a flag
// of its own.
inline bool starts_from_zero(const Sequence& s, int64_t t, int64_t slot, bool reverse) {
  if (!s.reset) return false;
  if (!reverse) return s.reset[s.tensor_row(t, slot)];
  return has_previous(s, t, slot, true) && boundary_after(s, t + 1, slot, true);
}

// Walks the compact rows [first, first + count): f(i, t, slot).
template <class F>
inline void for_rows(const Sequence& s, int64_t first, int64_t count, const F& f) {
  if (count == 0) return;
  int64_t t;
  if (!s.offsets) {
    t = first / s.batch;
  } else {
    t = std::upper_bound(s.offsets, s.offsets + s.steps, first) - s.offsets - 1;
  }
  int64_t slot = first - s.offset(t);
  for (int64_t i = 0; i < count; ++i, ++slot) {
    while (slot >= s.batch_size(t)) {
      ++t;
      slot = 0;
    }
    f(i, t, slot);
  }
}

// Null without data, as a tensor of rows without elements has none.
template <class S>
inline S* at(const Rows& rows, const Sequence& s, int64_t t, int64_t slot) {
  return rows.data ? static_cast<S*>(rows.data) + rows.at(s, t, slot) : nullptr;
}

// The state before step t, null where it is zero: without data, without `first` [B, width], behind a reset.
template <class S>
inline const S* previous_state(const Sequence& s, const Rows& rows, const void* first, int64_t width, int64_t t,
                               int64_t slot, bool reverse) {
  if (starts_from_zero(s, t, slot, reverse)) return nullptr;
  if (!has_previous(s, t, slot, reverse))
    return first ? static_cast<const S*>(first) + s.batch_row(slot) * width : nullptr;
  return at<const S>(rows, s, reverse ? t + 1 : t - 1, slot);
}

constexpr int kMaxBlockVectors = 4 * kMaxVectors;  // gates times vectors of a block, at most
static_assert(kMaxGates <= kMaxBlockVectors);
// Elements of the product of a block with a few rows; a load of the last units takes a whole vector.
template <class Acc>
constexpr int kTileElements = (kTileRows * kMaxBlockVectors + 1) * Vec<Acc>::kLanes;

// Units a block: one vector for each of the `gates` that a product makes, four vectors in all, so that a tile is one
// block. A small layer is one block, whose gates lie side by side without padding between them. all_gates: those of the
// cell.
template <class S>
inline UnitBlocks unit_blocks(int gates, int all_gates, int64_t hidden, Divide divide) {
  constexpr int kLanes = Vec<acc_t<S>>::kLanes;
  UnitBlocks blocks;
  blocks.units = hidden;
  blocks.gates = gates;
  blocks.lanes = kLanes;
  blocks.block = kLanes * std::max(1, std::min(kMaxVectors / gates, kMaxBlockVectors / all_gates));
  if (divide == Divide::rows && hidden <= kMaxVectors * kLanes && all_gates * hidden <= kMaxBlockVectors * kLanes)
    blocks.block = hidden;
  return blocks;
}
// Columns of a product with a weight as it lies: four vectors a block; with units divided, fewer where that shares them
// out more evenly.
template <class S>
inline UnitBlocks column_blocks(int64_t units, Divide divide, int size) {
  constexpr int kLanes = Vec<acc_t<S>>::kLanes;
  UnitBlocks blocks;
  blocks.units = units;
  blocks.lanes = kLanes;
  blocks.block = kMaxVectors * kLanes;
  if (divide == Divide::rows) return blocks;
  int64_t best = -1;
  for (int vectors = kMaxVectors; vectors > 0; --vectors) {
    const int64_t longest = divide_up(divide_up(units, vectors * kLanes), size) * vectors;
    if (best >= 0 && longest >= best) continue;
    best = longest;
    blocks.block = vectors * kLanes;
  }
  return blocks;
}
// Where a share of blocks ends, in units.
inline int64_t end_of(const UnitBlocks& blocks, const Share& share) {
  return share.begin < share.end ? blocks.first(share.end - 1) + blocks.size(share.end - 1) : 0;
}

// The rows of a weight [G*H, width] that belong to a cell's second product; null without one, or without the weight.
template <class Cell, class S>
inline const S* second_rows(const void* weight, int64_t hidden, int64_t width) {
  if (!has_two_products<Cell> || !weight) return nullptr;
  return static_cast<const S*>(weight) + first_gates<Cell> * hidden * width;
}

template <class S>
inline void zero_units(typename Product<S>::Unit* row, int64_t elements) {
  memset(row, 0, units_of<S>(elements) * sizeof(*row));
}

// Rounds to the storage type and keeps the value as an operand.
template <class S>
inline void store_operand(typename Product<S>::Operand* p, Vec<acc_t<S>> x, int64_t n) {
  using Operand = typename Product<S>::Operand;
  if constexpr (std::is_same_v<S, Operand>) {
    store(p, x, n);
  } else {
    constexpr int kLanes = Vec<acc_t<S>>::kLanes;
    S rounded[kLanes];
    store(rounded, x);
    store(p, load(static_cast<const S*>(rounded)), n);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
