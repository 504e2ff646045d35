"Tables as people leave them: whatever a file holds, the readers decide visibly or refuse with a sentence; and no id of a table or a folder leads out of its place."
import os
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mscan.contents import header_contrast
from mscan.check import check
from mscan.prepare import read_examined, read_tables
from mscan.rsna import (CELLS, GRADES, VIEWS, TableError, TableWarning, check_id, described_view, discover_studies, is_id,
                        read_coordinates, read_descriptions, read_train)

HEADER, POINT, SERIES = ','.join(('study_id', *CELLS)), 'study_id,series_id,instance_number,condition,level,x,y', 'study_id,series_id,series_description'
READERS = {HEADER: lambda p: read_train(p, strict=False), POINT: lambda p: read_coordinates(p, strict=False), SERIES: read_descriptions}
EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text(alphabet=st.characters(exclude_categories=['Cs'], exclude_characters='",\r\n\0'), max_size=12)
GRADE_CELLS = st.lists(st.sampled_from([*GRADES, '']), min_size=25, max_size=25)


def quiet(read, *args):
    "What a reader returns, and the sentences that it warned with."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        out = read(*args)
    return out, [str(w.message) for w in said if issubclass(w.category, TableWarning)]


def write(folder, text, name='t.csv', encoding='utf-8'):
    (Path(folder) / name).write_bytes(text.encode(encoding))
    return Path(folder) / name


# --- any bytes at all -----------------------------------------------------------------------------------------------

@EXAMPLES
@given(st.sampled_from(list(READERS)), st.binary(max_size=300), st.booleans())
def test_no_bytes_make_a_reader_crash(tmp_path, header, data, headed):
    (tmp_path / 't.csv').write_bytes((header.encode() + b'\n' if headed else b'') + data)
    try: quiet(READERS[header], tmp_path / 't.csv')
    except TableError as e: assert 't.csv' in str(e) and len(str(e)) < 600


@EXAMPLES
@given(st.sampled_from([(HEADER, 26), (POINT, 7), (SERIES, 3)]), st.data())
def test_no_words_make_a_reader_crash_and_what_is_read_is_valid(tmp_path, kind, data):
    header, n = kind
    rows = data.draw(st.lists(st.lists(WORDS, min_size=n, max_size=n), max_size=5))
    try: table, _ = quiet(READERS[header], write(tmp_path, '\n'.join([header, *(','.join(r) for r in rows)])))
    except TableError: return
    assert table.study_id.map(is_id).all() and ('series_id' not in table or table.series_id.map(is_id).all())
    if header == HEADER: assert len(table) == 25 * table.study_id.nunique()
    if header == SERIES: assert table['view'].isin(list(VIEWS.values())).all()


# --- the same table, stored otherwise -------------------------------------------------------------------------------

@EXAMPLES
@given(st.lists(GRADE_CELLS, min_size=1, max_size=2), st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16']), st.sampled_from(['\n', '\r\n', '\r']), st.integers(0, 3), st.booleans(), st.booleans())
def test_line_ends_bom_blank_rows_case_and_repeats_change_nothing(tmp_path, studies, encoding, end, blank, lower, again):
    lines = [HEADER, *(f'{k + 7},' + ','.join(cells) for k, cells in enumerate(studies))]
    plain, said = quiet(READERS[HEADER], write(tmp_path, '\n'.join(lines)))
    other = [lines[0], *(line.lower().replace('/', ' / ') if lower else line for line in lines[1:]), *(lines[1:] if again else []), *([',' * 25, '', ' ,' * 25][:blank])]
    table, why = quiet(READERS[HEADER], write(tmp_path, end.join(other) + end, encoding=encoding))
    assert table.equals(plain) and said == []
    assert any('spelling' in w for w in why) == (lower and any(any(c) for c in studies)) and any('blank' in w for w in why) == bool(blank)


@EXAMPLES
@given(st.lists(GRADE_CELLS, min_size=2, max_size=2), st.integers(0, 1), st.integers(0, 24), WORDS.filter(lambda w: w.strip() and w.strip().lower() not in ('normal', 'mild', 'moderate', 'severe', 'nan', 'na', 'null', 'none', 'n/a', '<na>', '#n/a', '#na')))
def test_an_unknown_grade_costs_its_own_cell(tmp_path, studies, row, cell, word):
    if sum(map(bool, sum(studies, []))) < 4: return
    spoiled = [list(s) for s in studies]
    spoiled[row][cell] = word
    text = lambda s: '\n'.join([HEADER, *(f'{k + 7},' + ','.join(c) for k, c in enumerate(s))])
    (plain, _), (table, said) = quiet(READERS[HEADER], write(tmp_path, text(studies))), quiet(READERS[HEADER], write(tmp_path, text(spoiled)))
    differ = table.index[~(table.grade.eq(plain.grade) | (table.grade.isna() & plain.grade.isna()))]
    assert set(differ) <= {row * 25 + cell} and pd.isna(table.grade[row * 25 + cell])
    assert any('unknown grade' in w and f'line {row + 2}' in w for w in said)
    with pytest.raises(TableError, match=f'line {row + 2}'): read_train(tmp_path / 't.csv')            # strict: refused with its line


def test_two_lines_of_a_study_agree_where_they_agree(tmp_path):
    line = lambda *cells: '7,' + ','.join([*cells, *['Moderate'] * (25 - len(cells))])
    table, said = quiet(READERS[HEADER], write(tmp_path, '\n'.join([HEADER, line('Severe', 'Severe', ''), line('Severe', 'Normal/Mild', 'Severe'), '8' + ',Severe' * 25])))
    assert table.grade[:4].fillna(-1).tolist() == [2, -1, -1, 1] and len(table) == 50 and any('lines that differ' in w and 'study 7' in w for w in said)


def test_a_table_of_unknown_words_is_another_table(tmp_path):
    for header, line in ((HEADER, '7' + ',yes' * 25), (POINT, '7,70,1,disc,L1,1,2')):
        with pytest.raises(TableError, match='line 2'): quiet(READERS[header], write(tmp_path, f'{header}\n{line}\n{line}0\n'))
    with pytest.raises(TableError, match="separated by ';'.*commas"): quiet(READERS[POINT], write(tmp_path, POINT.replace(',', ';') + '\n7;70;1;x;y;1;2\n'))


@pytest.mark.parametrize('word', ['l4-l5', 'L4 L5', 'L4-5', 'l4_l5'])
def test_levels_and_conditions_in_other_spellings(tmp_path, word):
    for condition in ('spinal canal stenosis', 'SPINAL_CANAL_STENOSIS'):
        table, _ = quiet(READERS[POINT], write(tmp_path, f'{POINT}\n7,70,1,{condition},{word},1,2\n'))
        assert table.iloc[0].tolist() == ['7', '70', 1, 'spinal_canal_stenosis', 'l4_l5', 1., 2.]


@EXAMPLES
@given(st.lists(st.sampled_from(['good', 'level', 'number', 'id', 'empty', 'huge']), min_size=1, max_size=8).filter(lambda k: k.count('good') * 2 > len(k)))
def test_lines_that_cannot_be_used_are_left_out_and_counted(tmp_path, kinds):
    made = dict(good='7,70,{n},Spinal Canal Stenosis,L3/L4,1.5,2', level='7,70,{n},Spinal Canal Stenosis,L9/L4,1,2', number='7,70,{n},Spinal Canal Stenosis,L3/L4,?,2',
                id='../7,70,{n},Spinal Canal Stenosis,L3/L4,1,2', empty='7,,{n},Spinal Canal Stenosis,L3/L4,1,2', huge='7,70,1e30,Spinal Canal Stenosis,L3/L4,{n},2')
    table, said = quiet(READERS[POINT], write(tmp_path, '\n'.join([POINT, *(made[k].format(n=n) for n, k in enumerate(kinds))])))
    assert table.instance_number.tolist() == [n for n, k in enumerate(kinds) if k == 'good']
    assert sum(int(w.split(': ')[1].split()[0]) for w in said) == sum(k != 'good' for k in kinds)


def test_descriptions_by_what_they_say():
    for view, words in (('sagittal_t1', ('SAG T1', 't1 sagittal', 'Sagittal T1 TSE')), ('sagittal_t2', ('Sagittal T2', 'sag stir', 'STIR SAGITTAL')), ('axial_t2', ('AXIAL_T2', 'T2 tra', 'ax t2 frfse')),
                        (None, ('Axial T1', 'Coronal T2', 'localizer', '', 'T2', 'sagittal', 'Sag T1/T2'))):
        assert {described_view(w) for w in words} == {view}, view


# --- ids and paths --------------------------------------------------------------------------------------------------

@EXAMPLES
@given(st.text(max_size=40) | st.sampled_from(['..', '.', '../../etc/passwd', '/etc/passwd', 'C:\\x', 'a/../b', 'x\0y', '~', 'x' * 300, 'é' * 150, 'a\u202eb', '-rf', 'NUL']))
def test_an_id_stays_in_its_folder(word):
    if not is_id(word):
        with pytest.raises(TableError, match='cannot be the name of a folder') as error: check_id(word)
        assert str(error.value).isprintable() and len(str(error.value)) < 300
    else:
        path = Path('/data/train_images') / word
        assert path.parent == Path('/data/train_images') and path.name == word and path.resolve().parent == Path('/data/train_images') and len((word + '.npy').encode()) <= 255


def test_ids_that_lead_elsewhere_reach_no_path(tmp_path, small_data):
    "Tables with such ids: their lines are left out with a sentence, nothing outside is touched, the others are read."
    folder = tmp_path / 'data'
    folder.mkdir()
    (tmp_path / 'outside').mkdir(), (tmp_path / 'outside' / 'x.dcm').write_bytes(b'not ours')
    study = sorted(p.name for p in (small_data / 'train_images').iterdir())[0]
    shutil.copytree(small_data / 'train_images' / study, folder / 'train_images' / study)
    (folder / 'train_images' / 'a\nb').mkdir(), (folder / 'train_images' / ('x' * 250)).mkdir()
    for name in ('train.csv', 'train_label_coordinates.csv', 'train_series_descriptions.csv'):
        text = (small_data / name).read_text()
        first = text.splitlines()[1].split(',')
        bad = [','.join([i, *first[1:]]) for i in ('../outside', str(tmp_path / 'outside'), 'a\\b', 'x' * 300, 'a\0b')]
        if name != 'train.csv': bad += [','.join([first[0], i, *first[2:]]) for i in ('../../outside', '/etc')]
        (folder / name).write_text(text.rstrip('\n') + '\n' + '\n'.join(bad) + '\n')
    tables = read_tables(folder)
    assert tables.studies == [study] and set(tables.labels.study_id) == {study}
    assert sum('cannot be the name of a folder' in n or 'cannot be an id' in n for n in tables.notes) >= 5, tables.notes
    for bad in ('../outside', '/etc', 'a\0b', 'x' * 300):
        with pytest.raises(TableError, match='cannot be the name of a folder'): read_examined(folder, 'train', bad, None)
    assert (tmp_path / 'outside' / 'x.dcm').read_bytes() == b'not ours' and len(check(folder, workers=1, progress=False)['train']) == 1


def test_a_folder_name_that_is_no_text_is_passed_over(tmp_path):
    (tmp_path / 'test_images' / '7').mkdir(parents=True), (tmp_path / 'test_images' / '²').mkdir()
    try: os.mkdir(bytes(tmp_path / 'test_images') + b'/\xff\xfe')
    except OSError: pytest.skip('this file system takes UTF-8 names only')
    found, said = quiet(discover_studies, tmp_path, 'test')
    assert found == ['7', '²'] and len(said) == 1 and said[0].isprintable()


# --- tables against images ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def odd_data(small_data, tmp_path_factory):
    "A copy whose tables and images disagree."
    folder = tmp_path_factory.mktemp('odd') / 'data'
    shutil.copytree(small_data, folder)
    studies = sorted(p.name for p in (folder / 'train_images').iterdir())
    shutil.rmtree(folder / 'train_images' / studies[0])                                  # named, without images
    for name in ('train.csv', 'train_series_descriptions.csv'):                          # images that no table names
        text = (folder / name).read_text().splitlines()
        (folder / name).write_text('\n'.join(line for line in text if not line.startswith(studies[1] + ',')) + '\n')
    (folder / 'test_series_descriptions.csv').unlink()
    return folder, studies


def test_tables_and_images_disagree_in_notes(odd_data):
    folder, studies = odd_data
    train, test = read_tables(folder), read_tables(folder, 'test')
    assert train.studies == sorted(studies[2:]) and len(test.studies) == 2
    assert any('1 of 5 train studies with images have no row in train.csv' in n for n in train.notes) and any('the other 1 are left out' in n for n in train.notes)
    assert any('views are decided from the images' in n for n in test.notes)


@pytest.mark.parametrize('headers', [True, False])
def test_without_a_description_table_views_come_from_the_images(small_data, odd_data, headers, tmp_path):
    "Plane from geometry; contrast from the header where it names one, else from the pixels of both sagittal series."
    import pydicom
    described = read_descriptions(small_data / 'test_series_descriptions.csv')
    folder = odd_data[0]
    if not headers:
        folder = tmp_path / 'bare'
        shutil.copytree(odd_data[0] / 'test_images', folder / 'test_images')
        for f in folder.glob('test_images/*/*/*.dcm'):
            d = pydicom.dcmread(f)
            if 'SeriesDescription' in d: del d.SeriesDescription
            d.save_as(f)
    for study_id in sorted(set(described.study_id)):
        study, findings = read_examined(folder, 'test', study_id, None)
        want = described[described.study_id == study_id].set_index('series_id')['view'].to_dict()
        assert {s.series_id: s.view for s in study.series} == want
        assert {header_contrast(folder / 'test_images' / study_id, s) for s in study.series} == ({'t1', 't2'} if headers else {''})
        assert bool(findings) == (not headers) and all(f['kind'] in ('contrast_from_image', 'contrast_guessed') for f in findings)


def test_a_folder_of_test_images_beside_a_train_table_is_checked(small_data, tmp_path):
    (tmp_path / 'test_images').symlink_to(small_data / 'test_images')
    shutil.copy(small_data / 'train.csv', tmp_path), shutil.copy(small_data / 'train_label_coordinates.csv', tmp_path)
    report = check(tmp_path, workers=1, progress=False)
    assert len(report['test']) == 2 and report['train'] == [] and any('no folder train_images' in n for n in report['notes'])
