"use strict";
// Volumes are stored with the last axis fastest. A slice across axis 0 shows axes 1 and 2, across 1: 0 and 2, across 2: 0 and 1.
const bytes = (text, Type) => new Type(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const TILE = 170;
const state = { point: LOOK.point.slice(), mode: "similarity" };

for (const image of LOOK.images) image.grey = bytes(image.grey, Uint8Array);
for (const network of LOOK.networks) for (const d of network.images) {
  d.rows = bytes(d.rows, Int8Array);
  d.body = bytes(d.body, Uint8Array);
  d.colours = bytes(d.colours, Uint8Array);
  d.regions = bytes(d.regions, Int8Array);
}

// The cell of a grid in which a point of the image lies.
function cellOf(point, image, bins) {
  const index = point.map((p, a) => Math.max(0, Math.min(bins[a] - 1, Math.floor(p / image.size[a] * bins[a]))));
  return (index[0] * bins[1] + index[1]) * bins[2] + index[2];
}

// The voxel of the image's file, in the order of its array's axes, in which a point lies.
function voxelOf(point, image) {
  const { begin, step, order } = image.file, voxel = [0, 0, 0];
  point.forEach((p, a) => { voxel[order[a]] = Math.floor(begin[order[a]] + p * step[order[a]]); });
  return "voxel " + voxel.join(" ");
}

// Similarity of every cell of d to cell q of the first image, and the place of the best one in the body.
function search(network, target) {
  const source = network.images[0], d = network.images[target], dims = network.dims;
  const q = cellOf(state.point, LOOK.images[0], source.bins);
  const heat = new Float32Array(d.body.length);
  let best = -1;
  for (let r = 0; r < heat.length; r++) {
    let sum = 0;
    for (let f = 0; f < dims; f++) sum += d.rows[r * dims + f] * source.rows[q * dims + f];
    heat[r] = sum / network.scale ** 2;
    if (d.body[r] && (best < 0 || heat[r] > heat[best])) best = r;
  }
  const [, J, K] = d.bins, image = LOOK.images[target];
  const index = [Math.floor(best / (J * K)), Math.floor(best / K) % J, best % K];
  return { heat, similarity: heat[best], place: index.map((i, a) => (i + 0.5) * image.size[a] / d.bins[a]) };
}

function stretch(heat) {
  const sorted = Float32Array.from(heat).sort();
  const low = sorted[sorted.length >> 1], high = sorted[sorted.length - 1];
  return heat.map(h => Math.max(0, Math.min(1, (h - low) / Math.max(high - low, 1e-6))) ** 3);
}

// Where a slice lies on its canvas: all three of one scale in millimetres.
function layout(image) {
  const extent = image.size.map((n, a) => n * image.spacing[a]);
  const scale = TILE / Math.max(...extent);
  return [0, 1, 2].map(axis => {
    const [rows, columns] = [0, 1, 2].filter(a => a !== axis);
    const height = Math.max(1, Math.round(extent[rows] * scale)), width = Math.max(1, Math.round(extent[columns] * scale));
    return { axis, rows, columns, height, width, top: (TILE - height) >> 1, left: axis * TILE + ((TILE - width) >> 1) };
  });
}

function draw(canvas, number, network, point, heat) {
  const image = LOOK.images[number], d = network.images[number], context = canvas.getContext("2d");
  const pixels = context.createImageData(3 * TILE, TILE), at = [0, 0, 0];
  for (let i = 3; i < pixels.data.length; i += 4) pixels.data[i] = 255;
  for (const s of layout(image)) {
    at[s.axis] = point[s.axis];
    for (let y = 0; y < s.height; y++) for (let x = 0; x < s.width; x++) {
      const up = s.rows === 0 ? s.height - 1 - y : y;
      at[s.rows] = (up + 0.5) / s.height * image.size[s.rows];
      at[s.columns] = (x + 0.5) / s.width * image.size[s.columns];
      const grey = image.grey[cellOf(at, image, image.bins)], cell = cellOf(at, image, d.bins);
      const to = 4 * ((s.top + y) * 3 * TILE + s.left + x);
      let colour = [grey, grey, grey];
      if (state.mode === "colours") colour = d.body[cell] ? [0, 1, 2].map(c => 0.75 * d.colours[3 * cell + c] + 0.25 * grey) : [0, 0, 0];
      else if (state.mode === "regions") colour = d.regions[cell] < 0 ? [0, 0, 0] : LOOK.palette[d.regions[cell]].map(c => 0.75 * c + 0.25 * grey);
      else if (heat) {
        const h = heat[cell];
        colour = [grey + (255 - grey) * h, grey + (200 * h - grey) * h, grey * (1 - h)];
      }
      for (let c = 0; c < 3; c++) pixels.data[to + c] = colour[c];
    }
  }
  context.putImageData(pixels, 0, 0);
  context.strokeStyle = number === 0 ? "#0ff" : "#0f0";
  context.lineWidth = 1.5;
  for (const s of layout(image)) {
    const fraction = point[s.rows] / image.size[s.rows];
    const y = s.top + (s.rows === 0 ? 1 - fraction : fraction) * s.height, x = s.left + point[s.columns] / image.size[s.columns] * s.width;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { context.moveTo(x + 3 * dx, y + 3 * dy); context.lineTo(x + 9 * dx, y + 9 * dy); }
    context.stroke();
  }
}

function pointed(event) {
  const canvas = event.currentTarget, box = canvas.getBoundingClientRect(), image = LOOK.images[0];
  const x = (event.clientX - box.left) / box.width * 3 * TILE, y = (event.clientY - box.top) / box.height * TILE;
  for (const s of layout(image)) {
    if (x < s.left || x >= s.left + s.width || y < s.top || y >= s.top + s.height) continue;
    const fraction = (y - s.top) / s.height;
    state.point[s.rows] = (s.rows === 0 ? 1 - fraction : fraction) * image.size[s.rows];
    state.point[s.columns] = (x - s.left) / s.width * image.size[s.columns];
    show();
    return;
  }
}

const shown = [];
function build() {
  const choices = document.getElementById("choices");
  for (const [mode, words] of [["similarity", "similarity"], ["colours", "principal components"], ["regions", "regions (k-means)"]]) {
    const label = document.createElement("label"), input = document.createElement("input");
    input.type = "radio"; input.name = "mode"; input.checked = mode === state.mode;
    input.addEventListener("change", () => { state.mode = mode; show(); });
    label.append(input, " " + words);
    choices.append(label);
  }
  for (const network of LOOK.networks) {
    const title = document.createElement("h2"), row = document.createElement("div");
    title.textContent = network.name;
    row.className = "row";
    document.getElementById("networks").append(title, row);
    LOOK.images.forEach((image, number) => {
      const box = document.createElement("div"), caption = document.createElement("div"), canvas = document.createElement("canvas");
      box.className = "image";
      canvas.width = 3 * TILE; canvas.height = TILE;
      if (number === 0) {
        canvas.addEventListener("pointerdown", pointed);
        canvas.addEventListener("pointermove", event => { if (event.buttons) pointed(event); });
      } else canvas.style.cursor = "default";
      box.append(caption, canvas);
      row.append(box);
      shown.push({ network, number, caption, canvas });
    });
  }
}

function show() {
  for (const { network, number, caption, canvas } of shown) {
    const image = LOOK.images[number];
    if (number === 0) {
      caption.textContent = image.name + ", " + voxelOf(state.point, image);
      draw(canvas, 0, network, state.point, null);
    } else {
      const found = search(network, number);
      caption.textContent = image.name + ", similarity " + found.similarity.toFixed(2) + ", " + voxelOf(found.place, image);
      draw(canvas, number, network, found.place, stretch(found.heat));
    }
  }
}

build();
show();
