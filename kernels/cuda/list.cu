// The blocks of a launch are those of several items, one item's behind the other's: 'index' is a block's number among the
// 'count' of its item.
struct Part { u64 index, count; };

// A launch's items, as many as fit into the 4096 bytes of a kernel's parameters. Item has 'first', its first block, and
// 'blocks', how many it has.
template <class Item> struct List { u64 count; Item items[(4096 - sizeof(u64)) / sizeof(Item)]; };

// The item of a block: the last one that begins at it or before.
template <class Item> __device__ inline u64 item_of(const List<Item> &list, u64 block) {
  u64 low = 0, high = list.count - 1;
  while (low < high) {
    const u64 middle = (low + high + 1) / 2;
    if (list.items[middle].first <= block) low = middle; else high = middle - 1;
  }
  return low;
}

#define FOR_EACH(i, elements) for (u64 i = part.index * blockDim.x + threadIdx.x; i < elements; i += part.count * blockDim.x)
