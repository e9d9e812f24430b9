// The sliders and the heat maps show one size together; a new size goes to Python as the event "select".
const sliders = [...element.querySelectorAll('input[type=range]')];
const cells = [...element.querySelectorAll('button[data-dim]')];
const stop = (slider) => slider.dataset.stops.split(',')[slider.value];

function show() {
  for (const slider of sliders) {
    slider.parentElement.querySelector('output').textContent = stop(slider);
    slider.setAttribute('aria-valuetext', stop(slider));
    slider.style.setProperty('--filled', `${100 * slider.value / Math.max(slider.max, 1)}%`);
  }
  const [layers, dim] = sliders.map(stop);
  for (const cell of cells) {
    cell.setAttribute('aria-pressed', cell.dataset.layers === layers && cell.dataset.dim === dim);
  }
}

function choose() {
  show();
  const [layers, dim] = sliders.map(stop);
  trigger('select', { layers: Number(layers), dim: Number(dim) });
}

for (const slider of sliders) slider.addEventListener('input', choose);
for (const cell of cells) {
  cell.addEventListener('click', () => {
    for (const slider of sliders) {
      const value = slider.name === 'dim' ? cell.dataset.dim : cell.dataset.layers;
      slider.value = slider.dataset.stops.split(',').indexOf(value);
    }
    choose();
  });
}
for (const tab of element.querySelectorAll('[data-map]')) {
  tab.addEventListener('click', () => {
    for (const other of element.querySelectorAll('[data-map]')) other.setAttribute('aria-pressed', other === tab);
    for (const map of element.querySelectorAll('[data-shown]')) map.hidden = map.dataset.shown !== tab.dataset.map;
  });
}
show();
