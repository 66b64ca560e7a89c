// Owns: the equations of zoneout, which keeps a state's last value in place of the cell's new one, forward and
// backward, for one unit of one row.
// Must not know: cells, how k is drawn.
#pragma once

#include "host_device.h"

namespace rnnfast {

// k old + (1 - k) new. In training k is 0 or 1, in evaluation its probability.
// Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations", ICLR 2017.
template <class V>
RNNFAST_HOST_DEVICE V zoned(V k, V old, V fresh) {
  return k * old + (V(1) - k) * fresh;
}

// From the gradient of k old + (1 - k) new: `grad` becomes that of new, and that of old is returned.
template <class V>
RNNFAST_HOST_DEVICE V divide_gradient(V k, V& grad) {
  const V kept = k * grad;
  grad = grad - kept;
  return kept;
}

}  // namespace rnnfast
