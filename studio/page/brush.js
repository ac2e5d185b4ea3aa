// The mask: strokes over an image, kept as lines, so that they can be undone and drawn at any size.

export class Mask {
  // strokes: {size, points} with all numbers as shares of the image's width; or {invert: true}
  constructor(strokes = []) {
    this.strokes = strokes;
  }

  get empty() {
    return this.strokes.length === 0;
  }

  // White where something is to be regenerated, on black, width x height.
  canvas(width, height) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, width, height);
    pen.strokeStyle = pen.fillStyle = "#fff";
    pen.lineCap = pen.lineJoin = "round";
    for (const stroke of this.strokes) {
      if (stroke.invert) {
        pen.globalCompositeOperation = "difference";
        pen.fillRect(0, 0, width, height);
        pen.globalCompositeOperation = "source-over";
        continue;
      }
      pen.lineWidth = Math.max(2, stroke.size * width); // a tap marks a pixel at least, on the smallest of images
      pen.beginPath();
      const [first, ...rest] = stroke.points;
      pen.moveTo(first[0] * width, first[1] * width);
      for (const [x, y] of rest.length ? rest : [first]) pen.lineTo(x * width, y * width);
      pen.stroke();
    }
    return canvas;
  }

  // Tint what is marked on a canvas that shows the image.
  show(canvas) {
    if (this.empty) return;
    const { width, height } = canvas;
    const tint = this.canvas(width, height);
    const pixels = tint.getContext("2d").getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data[i + 3] = pixels.data[i] * 0.6;
      [pixels.data[i], pixels.data[i + 1], pixels.data[i + 2]] = [240, 70, 160];
    }
    tint.getContext("2d").putImageData(pixels, 0, 0);
    canvas.getContext("2d").drawImage(tint, 0, 0);
  }
}

// Open the dialog over an image (a canvas); resolves to the mask when it is closed.
export function paint(dialog, image, mask) {
  const canvas = dialog.querySelector("#mask");
  const size = dialog.querySelector("#brush-size");
  const scale = Math.max(1, 768 / Math.max(image.width, image.height));
  canvas.width = Math.round(image.width * scale);
  canvas.height = Math.round(image.height * scale);
  const strokes = [...mask.strokes];
  let stroke = null;

  const redraw = () => {
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = image.width >= 160;
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    new Mask(strokes).show(canvas);
  };
  const at = (event) => {
    const box = canvas.getBoundingClientRect(); // the image is fitted into it, centred
    const fit = Math.min(box.width / canvas.width, box.height / canvas.height);
    const x = (event.clientX - box.left - (box.width - canvas.width * fit) / 2) / fit;
    const y = (event.clientY - box.top - (box.height - canvas.height * fit) / 2) / fit;
    return [x / canvas.width, y / canvas.width];
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    strokes.push((stroke = { size: Number(size.value), points: [at(event)] }));
    redraw();
  };
  canvas.onpointermove = (event) => {
    if (!stroke) return;
    stroke.points.push(at(event));
    redraw();
  };
  canvas.onpointerup = canvas.onpointercancel = () => (stroke = null);
  const does = {
    undo: () => strokes.pop(),
    invert: () => strokes.push({ invert: true }),
    clear: () => strokes.splice(0),
  };
  for (const [id, act] of Object.entries(does)) {
    dialog.querySelector(`#${id}`).onclick = () => {
      act();
      redraw();
    };
  }
  dialog.onkeydown = (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "z") dialog.querySelector("#undo").click();
  };
  dialog.querySelector("#painted").onclick = () => dialog.close();
  redraw();
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(new Mask(strokes)), { once: true }));
}
